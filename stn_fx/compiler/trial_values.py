"""Captured values to try an operator on.

On the captured ones themselves an operator may compare symbolic sizes, and torch then fixes the batch size for all of
the graph without a word.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

ANY_SIZE = 2
"""For sizes that the captured example does not tell, since they depend on its data."""


def trial_arguments(node: Node) -> tuple[FakeTensorMode, tuple[Any, ...], dict[str, Any]]:
    """The node's arguments at the sizes of the captured example: fake tensors of a mode of their own, to call it in."""
    mode = FakeTensorMode()
    with mode:
        args, kwargs = map_arg(
            (node.args, dict(node.kwargs)), lambda source: pytree.tree_map(_sized, source.meta.get("val"))
        )
    return mode, args, kwargs


def _sized(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return _size(value)
    if not isinstance(value, Tensor):
        return value
    sizes, strides = [_size(s) for s in value.shape], [_size(s) for s in value.stride()]
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)


def _size(size: Any) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    return int(size.node.hint) if size.node.has_hint() else ANY_SIZE
