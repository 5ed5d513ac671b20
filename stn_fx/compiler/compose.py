"""Linear computations on a weight before its use: which axis stays the row axis, and how a response passes through."""

import operator
from collections.abc import Callable
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from stn_fx.rules.rule import Emitter, StructuredChange

aten = torch.ops.aten

_SAME = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.contiguous.default,
    aten.clone.default, aten.alias.default, aten.lift_fresh_copy.default, aten.type_as.default,
}  # fmt: skip
_RESHAPES = {
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.dim,
    aten.unsqueeze.default,
}  # fmt: skip
_RESIZES = {
    getattr(aten, name).vec
    for name in ("upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d",
                 "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
}  # fmt: skip
"""Of each channel by itself."""
GATHERS = {aten.embedding.default, aten.index.Tensor}
"""Of rows at fixed places."""
_PRODUCTS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
_SPLITS = {aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default}


def linear_operand(node: Node, is_fixed: Callable[[Any], bool]) -> int | None:
    """Position of the argument that the operator is linear in, where a structured response can pass it.

    Args:
        node: any call of an operator.
        is_fixed: whether a node depends neither on parameters nor on inputs, as the mask of a pruned or causal weight.
    """
    if node.target in _SAME | _SPLITS | _RESHAPES | _RESIZES or node.target in (
        aten.slice.Tensor,
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        operator.getitem,
    ):
        return 0
    if node.target in GATHERS:
        places = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
        return 0 if len(places) == 1 and is_fixed(places[0]) else None
    if node.target in _PRODUCTS:
        first, second = node.args[:2]
        if isinstance(second, Number) or is_fixed(second):
            return 0
        return 1 if node.target is aten.mul.Tensor and is_fixed(first) else None
    if node.target is aten.masked_fill.Scalar:
        return 0 if node.args[2] == 0 and is_fixed(node.args[1]) else None
    return None


def map_row_axis(node: Node, operand: int, axis: Any, low_rank: bool) -> Any:
    """Row axis after the operator that is linear in its argument ``operand``; None where it does not survive."""
    source = node.args[operand].meta.get("val")  # type: ignore[union-attr]
    if node.target in _SAME | _SPLITS or node.target is aten.slice.Tensor or node.target is operator.getitem:
        return axis
    if not isinstance(source, Tensor):
        return None
    if node.target in _PRODUCTS or node.target is aten.masked_fill.Scalar:
        # Masked entries stay zero under every hyperparameter; a mask of full shape has no low rank.
        return None if low_rank or node.meta["val"].shape != source.shape else axis
    rank = source.ndim
    if node.target is aten.t.default and rank == 2:
        return 1 - axis
    if node.target is aten.transpose.int:
        first, second = node.args[1] % rank, node.args[2] % rank
        if low_rank and rank != 2:
            return None
        return {first: second, second: first}.get(axis, axis)
    if node.target is aten.permute.default:
        return None if low_rank else [dim % rank for dim in node.args[1]].index(axis)  # type: ignore[union-attr]
    if node.target in _RESIZES:
        return axis if axis < 2 and not low_rank else None
    shape = node.meta["val"].shape
    if node.target in GATHERS:
        return axis + len(shape) - rank if axis > 0 and not low_rank else None
    if axis == 0 and shape and shape[0] == source.shape[0] and len(shape) > 1:  # reshapes of what each row holds
        return 0
    if low_rank:
        return None
    rows, before = source.shape[axis], source.shape[:axis].numel()
    kept = [other for other, size in enumerate(shape) if size == rows and shape[:other].numel() == before]
    return kept[0] if kept and rows != 1 else None


def compose(emit: Emitter, node: Node, operand: int, change: StructuredChange, axis: int) -> StructuredChange:
    """The change of ``node``'s value, given that of its argument ``operand`` (whose row axis is ``axis``)."""
    row_axis = map_row_axis(node, operand, axis, change.left is not None)
    assert row_axis is not None, "the plan has checked it"
    if node.target is operator.getitem:
        return _pick(emit, node, change, axis)
    cut = _cut(node)
    if cut is not None and cut % len(node.args[0].meta["val"].shape) == axis:
        scales_node = change.scales if change.left is not None else _cut_columns(emit, node, change.scales)
        if change.left is not None:
            return StructuredChange(change.factor, scales_node, row_axis, _cut_rows(emit, node, change.left))
        return StructuredChange(emit.copy_with(node, 0, change.factor), scales_node, row_axis)
    if change.left is None:
        return StructuredChange(emit.copy_with(node, operand, change.factor), change.scales, row_axis)
    return StructuredChange(_inner_factor(emit, node, change.factor, axis), change.scales, row_axis, change.left)


def _pick(emit: Emitter, node: Node, change: StructuredChange, axis: int) -> StructuredChange:
    """One part of a split: whatever the split has cut is a tuple."""
    split, index = node.args
    along_rows = (_cut(split) or 0) % len(split.args[0].meta["val"].shape) == axis
    factor, scales, left = change.factor, change.scales, change.left
    if left is None:
        factor = emit.item(factor, index)
        scales = emit.item(scales, index) if along_rows else scales
    elif along_rows:
        left = emit.item(left, index)
    else:
        factor = emit.item(factor, index)
    return StructuredChange(factor, scales, axis, left)


def _cut(node: Node) -> Any:
    """The axis that a slice or split cuts."""
    if node.target is aten.slice.Tensor:
        return node.args[1] if len(node.args) > 1 else 0
    if node.target in _SPLITS:
        return node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    return None


def _with_axis(emit: Emitter, node: Node, tensor: Node, axis: int) -> Any:
    arguments = list(node.args)
    arguments[0] = tensor
    position = 1 if node.target is aten.slice.Tensor else 2
    arguments[position : position + 1] = [axis]
    return emit.call(node.target, *[emit.value(a) if a is not tensor else a for a in arguments])


def _cut_columns(emit: Emitter, node: Node, scales: Node) -> Any:
    return _with_axis(emit, node, scales, 1)


def _cut_rows(emit: Emitter, node: Node, left: Node) -> Any:
    return _with_axis(emit, node, left, 0)


def _inner_factor(emit: Emitter, node: Node, factor: Node, axis: int) -> Any:
    """``B`` (r, the other axes) after an operator that leaves the rows alone."""
    if node.target in (aten.t.default, aten.transpose.int):
        return factor
    if node.target in _RESHAPES:
        shape = [int(size) for size in node.meta["val"].shape[1:]]
        return emit.call(aten.reshape.default, factor, [-1, *shape])
    if node.target is aten.slice.Tensor or node.target in _SPLITS:
        cut = (_cut(node) or 0) % len(node.args[0].meta["val"].shape)
        return _with_axis(emit, node, factor, cut + 1 if cut < axis else cut)
    return emit.copy_with(node, 0, factor)
