"""What a captured graph holds for: the inputs' structure and shapes, the parameters' device and dtype, and the modes.

A new combination is captured anew; the captured ones are kept, so that going back and forth costs nothing.
"""

import inspect
from collections.abc import Container
from enum import Enum
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Signature = tuple[Any, ...]

_PLAIN = (int, float, complex, str, bytes, Enum, torch.dtype, torch.device, type(None))
_NOT_HELD = object()
_TORCHS_OWN = frozenset(vars(nn.Module()))
_DEPTH = 3
"""Of lists in configurations in attributes; what lies deeper is not compared."""
_LONG = 1000
"""Containers with more in them are data, not settings, and would take long to compare in every pass."""


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

    Settings are what a forward may read beside tensors (a rate, a temperature, a counter, a function, lists and
    configurations of them); not what is frozen, which differs under ``functional_call``. Modules that run as
    themselves, ``live`` by their ids, have nothing baked in.
    """
    parameters = tuple((p.device, p.dtype) for p in model.parameters())
    seen: dict[int, Any] = {}
    return parameters, tuple(_module(module, seen) for module in model.modules() if id(module) not in live)


def changed_settings(model: nn.Module, before: Signature, after: Signature, live: Container[int] = ()) -> list[str]:
    """Places whose settings differ between two signatures of this model, as ``layer1.0.temperature``."""
    names = [name for name, module in model.named_modules() if id(module) not in live]
    places = []
    for name, (_, _, _, old), (_, _, _, new) in zip(names, before[1], after[1], strict=False):
        places += [f"{name}.{key}".lstrip(".") for key, _ in sorted(set(old) ^ set(new), key=str)]
    return list(dict.fromkeys(places))


def _module(module: nn.Module, seen: dict[int, Any]) -> Signature:
    settings = tuple(
        (name, setting)
        for name, value in vars(module).items()
        if name not in _TORCHS_OWN and (setting := _setting(value, _DEPTH, seen)) is not _NOT_HELD
    )
    return type(module), tuple(module._forward_hooks), tuple(module._forward_pre_hooks), settings


def _setting(value: Any, depth: int, seen: dict[int, Any]) -> Any:
    """Something to compare by that changes with the value; `_NOT_HELD` for what is not compared.

    ``seen`` keeps what was found by the ids of containers and objects: layers often share one configuration.
    """
    if isinstance(value, _PLAIN) or inspect.isroutine(value):
        return value
    if depth == 0 or isinstance(value, (Tensor, nn.Module, type, ModuleType)):
        return _NOT_HELD
    if id(value) not in seen:
        seen[id(value)] = _NOT_HELD  # where it contains itself
        seen[id(value)] = _contents(value, depth - 1, seen)
    return seen[id(value)]


def _contents(value: Any, depth: int, seen: dict[int, Any]) -> Any:
    """Of a container if all in it is plain; of an object (a namespace, a configuration) what in it is plain."""
    if isinstance(value, (tuple, list, set, frozenset)):
        fields: Any = dict(enumerate(value)) if len(value) <= _LONG else None
    else:
        fields = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    if not isinstance(fields, dict) or len(fields) > _LONG:
        return _NOT_HELD
    found = {name: _setting(each, depth, seen) for name, each in fields.items()}
    held = tuple((name, setting) for name, setting in found.items() if setting is not _NOT_HELD)
    is_container = isinstance(value, (tuple, list, set, frozenset, dict))
    return _NOT_HELD if is_container and len(held) < len(fields) else (type(value), held)


def training_flags(model: nn.Module) -> Signature:
    """The mode of every submodule: a training graph holds for one vector of them (frozen batch norms are usual)."""
    return tuple(module.training for module in model.modules())
