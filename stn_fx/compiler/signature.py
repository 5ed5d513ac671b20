"""What a captured graph holds for: the inputs' structure and shapes, the parameters' device and dtype, and the modes.

A new combination is captured anew; the captured ones are kept, so that going back and forth costs nothing.
"""

from collections.abc import Container
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

Signature = tuple[Any, ...]


def input_signature(args: tuple[Any, ...], kwargs: dict[str, Any], batch_axes: list[int | None]) -> Signature:
    """Structure, dtypes and shapes of the inputs, without the batch size."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    if len(flat) != len(batch_axes):
        return (spec, len(flat))
    return (spec, *(_leaf(value, axis) for value, axis in zip(flat, batch_axes, strict=True)))


def _leaf(value: Any, batch_axis: int | None) -> Any:
    if not isinstance(value, Tensor):
        return ("constant", value)
    shape = tuple("batch" if axis == batch_axis else size for axis, size in enumerate(value.shape))
    return ("tensor", shape, value.dtype)


def module_signature(model: nn.Module, live: Container[int] = ()) -> Signature:
    """What a graph has baked in of the model: dtype and device of its parameters, its layers, hooks and plain settings.

    Settings are numbers and texts that a forward may read (a rate, a temperature, a counter); not what is frozen, which
    differs under ``functional_call``. Modules that run as themselves, ``live`` by their ids, have nothing baked in.
    """
    parameters = tuple((p.device, p.dtype) for p in model.parameters())
    return parameters, tuple(_module(module) for module in model.modules() if id(module) not in live)


def changed_settings(model: nn.Module, before: Signature, after: Signature, live: Container[int] = ()) -> list[str]:
    """Places whose settings differ between two signatures of this model, as ``layer1.0.temperature``."""
    names = [name for name, module in model.named_modules() if id(module) not in live]
    places = []
    for name, (_, _, _, old), (_, _, _, new) in zip(names, before[1], after[1], strict=False):
        places += [f"{name}.{key}".lstrip(".") for key, _ in sorted(set(old) ^ set(new), key=str)]
    return list(dict.fromkeys(places))


def _module(module: nn.Module) -> Signature:
    settings = tuple(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str)) and name not in ("training", "_is_full_backward_hook")
    )
    return type(module), tuple(module._forward_hooks), tuple(module._forward_pre_hooks), settings


def training_flags(model: nn.Module) -> Signature:
    """The mode of every submodule: a training graph holds for one vector of them (frozen batch norms are usual)."""
    return tuple(module.training for module in model.modules())
