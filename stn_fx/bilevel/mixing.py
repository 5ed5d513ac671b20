"""Mixup and CutMix in the training updates: inputs before the pass, targets when the number of classes is known.

With both, each batch is mixed in one of the two ways, by a fair coin, as torchvision's and timm's recipes do it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from stn_fx.augment.draws import Draws
from stn_fx.augment.mixing import Mixture, draw_cutmix, draw_mixup
from stn_fx.bilevel.batch import TARGET_KEYS, Batch, split
from stn_fx.bilevel.label_smoothing import soft_targets
from stn_fx.errors import InputError

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule


@dataclass(frozen=True)
class MixedBatch:
    """A batch whose inputs are mixed, if a hyperparameter asks for it; its targets follow with `with_targets`."""

    batch: Batch
    mixture: Mixture | None = None

    def with_targets(self, output: Any) -> Batch:
        """The batch with soft targets mixed alike, once the output tells the number of classes."""
        if self.mixture is None:
            return self.batch
        _, target = split(self.batch.content)
        if not target.is_floating_point():
            target = soft_targets(output, target, torch.zeros(len(target), device=target.device))
        return replace(self.batch, content=_with_target(self.batch.content, self.mixture.targets(target)))


def mix(stn: "SelfTuningModule", batch: Batch, values: Mapping[str, Tensor]) -> MixedBatch:
    """The batch with its inputs mixed as mixup and cutmix, with the values (B,) of each example, ask for.

    Raises:
        InputError: no input can be mixed, or not all of them.
    """
    ways = [name for name in ("mixup", "cutmix") if name in values]
    if not ways:
        return MixedBatch(batch)
    draws = Draws(stn.generator())
    # The coin of the CPU's generator: one on the device would have to be waited for.
    way = ways[int(torch.randint(len(ways), (), generator=stn.generator("cpu")))] if len(ways) > 1 else ways[0]
    leaves, structure = tree_flatten(batch.inputs)
    axes = {i: axis for i, axis in enumerate(stn.compiled.captured.batch_axes) if axis is not None}
    fitting = [i for i, leaf in enumerate(leaves) if i in axes and _fits(leaf, axes[i], way)]
    if way == "cutmix":
        fitting = fitting[:1]
    left = [leaf for i, leaf in enumerate(leaves) if i in axes and i not in fitting]
    if not fitting:
        what = "an image (B, C, H, W)" if way == "cutmix" else "a floating tensor with a batch axis"
        raise InputError(f"{way} needs {what} among the inputs, and there is none. Leave {way} out of hparams.")
    if left:
        what = ", ".join(f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}" for leaf in left)
        raise InputError(
            f"{way} mixes the targets of examples, and cannot mix all of their inputs ({what} would stay those of one "
            f"example). Leave {way} out of hparams."
        )
    x = leaves[fitting[0]].movedim(axes[fitting[0]], 0)
    mixture = (draw_mixup if way == "mixup" else draw_cutmix)(x, values[way], draws, way)
    for index in fitting:
        leaves[index] = mixture.inputs(leaves[index].movedim(axes[index], 0)).movedim(0, axes[index])
    return MixedBatch(replace(batch, inputs=tree_unflatten(leaves, structure)), mixture)


def _fits(value: Any, batch_axis: int, way: str) -> bool:
    fits = isinstance(value, Tensor) and value.is_floating_point()
    return fits and (way == "mixup" or (value.ndim == 4 and batch_axis == 0))


def _with_target(content: Any, target: Tensor) -> Any:
    """What the loader yielded with another target; see `stn_fx.bilevel.batch` for its forms."""
    if isinstance(content, Mapping):
        key = next(key for key in TARGET_KEYS if key in content)
        return {**content, key: target}
    return (*content[:-1], target)
