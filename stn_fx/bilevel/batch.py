"""From what a loader yields to what a model takes: inputs, target, device, number of examples.

Understood without a word from the user:

- `(x, ..., target)`: a tuple or list; the last element is the target, the others are positional inputs;
- a mapping with one of the keys in `TARGET_KEYS`; the other entries are keyword inputs.

Anything else needs `Objective(inputs=...)`, see `stn_fx.bilevel.objective`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from stn_fx.bilevel.replicas import Rows
from stn_fx.errors import InputError

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule

ALONE = Rows(0, 1, 1)
TARGET_KEYS = ("labels", "label", "targets", "target")

Inputs = tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """One batch, ready for the model.

    Attributes:
        content: what the loader yielded, on the device of the model; objectives see this.
        inputs: positional inputs as a tuple, or keyword inputs as a dict.
        rows: which examples of the whole batch these are, where several processes share it; known once
            `Algorithm.prepare` has seen the model's inputs.
    """

    content: Any
    inputs: Inputs
    rows: Rows = ALONE

    def feed(self, function: Callable[..., Any], **options: Any) -> Any:
        """Call `function` with the inputs, and with `options` as further keywords."""
        if isinstance(self.inputs, tuple):
            return function(*self.inputs, **options)
        return function(**self.inputs, **options)


def split(content: Any) -> tuple[Inputs, Any]:
    """Inputs and target of a batch.

    Raises:
        InputError: the batch is neither `(inputs..., target)` nor a mapping with a target.
    """
    if isinstance(content, Mapping):
        keys = [key for key in TARGET_KEYS if key in content]
        if len(keys) == 1 and len(content) > 1:
            return {str(key): value for key, value in content.items() if key != keys[0]}, content[keys[0]]
        raise InputError(
            f"A batch with the keys {', '.join(map(repr, content))} has {len(keys)} targets among "
            f"{', '.join(TARGET_KEYS)} and needs one of them beside its inputs. Rename the key in the loader's "
            f"collate_fn, or pass loss=Objective(train=..., inputs=...), which takes any batch."
        )
    if isinstance(content, (tuple, list)) and len(content) >= 2:
        return tuple(content[:-1]), content[-1]
    raise InputError(
        f"A batch of type {type(content).__name__} is neither (inputs..., target) nor a mapping with a target. Change "
        f"the loader's collate_fn, or pass loss=Objective(train=..., inputs=...), which takes any batch."
    )


def to_device(content: Any, device: torch.device) -> Any:
    """The batch with every tensor on `device`; asynchronous where the memory is pinned.

    Mappings of other packages (such as Hugging Face's BatchEncoding) become plain dicts, wherever they are.
    """

    def place(value: Any) -> Any:
        if isinstance(value, Mapping):
            return to_device(dict(value), device)
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    return tree_map(place, content, is_leaf=lambda value: isinstance(value, Mapping) and type(value) is not dict)


def batch_size(stn: "SelfTuningModule", batch: Batch) -> int:
    """Number of examples: the length of the batch axis of the first input that has one."""
    inputs = batch.feed(lambda *args, **kwargs: tree_leaves((args, kwargs)))
    axes = stn.compiled.captured.batch_axes
    return next(int(x.shape[axis]) for x, axis in zip(inputs, axes, strict=True) if axis is not None)
