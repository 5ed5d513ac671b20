"""Operators that are linear in their tensors: views, slices, sums, pools, resizing. The tangent passes as is."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from stn_fx.rules.elementwise import like_primal
from stn_fx.rules.rule import REGISTRY, Emitter, Rule

aten = torch.ops.aten

_OF_ONE_TENSOR = [
    "view", "reshape", "_unsafe_view", "permute", "transpose", "t", "flatten", "unflatten", "squeeze", "unsqueeze",
    "expand", "expand_as", "contiguous", "clone", "slice", "select", "index_select", "narrow", "split",
    "split_with_sizes", "chunk", "unbind", "roll", "flip", "mean", "sum", "cumsum", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_linear1d",
    "upsample_trilinear3d", "upsample_bicubic2d", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col",
    "col2im", "unfold", "neg", "to", "_to_copy", "type_as", "repeat", "repeat_interleave", "tile", "alias",
    "lift_fresh", "lift_fresh_copy", "diagonal", "tril", "triu", "movedim", "swapaxes", "view_as", "reshape_as",
    "gather", "rot90", "_upsample_nearest_exact2d", "index", "sum_to_size",
]  # fmt: skip


def _overloads(names: list[str]) -> tuple[Any, ...]:
    found = []
    for name in names:
        packet = getattr(aten, name, None)
        found += [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    return tuple(target for target in found if "out" not in {a.name for a in target._schema.arguments})


@REGISTRY.register
class LinearInInputRule(Rule):
    """Linear in the first argument, nothing else differentiable."""

    name = "structural"
    linear_in_first = True
    targets = _overloads(_OF_ONE_TENSOR)

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        primal = emit.copy(node)
        tangent = emit.tangent(node.args[0])
        if tangent is None or not emit.floating(node):
            return primal, None
        return primal, emit.copy_with(node, 0, tangent)


@REGISTRY.register
class ShiftedRule(Rule):
    """Linear but for a constant: padding and filling with a value; the tangent is padded and filled with zero."""

    name = "structural"
    targets = (aten.pad.default, aten.constant_pad_nd.default, aten.masked_fill.Scalar)

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        primal = emit.copy(node)
        tangent = emit.tangent(node.args[0])
        if tangent is None:
            return primal, None
        constant = emit.argument(node, "mode", "constant") == "constant"
        return primal, emit.copy_with(node, 0, tangent, **({"value": 0} if constant else {}))


@REGISTRY.register
class DetachRule(Rule):
    """``detach``: gradients stop here, and so does the tangent."""

    name = "structural"
    targets = (aten.detach.default,)

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        return emit.copy(node), None


@REGISTRY.register
class JoinRule(Rule):
    """``cat``, ``stack``: missing tangents are zeros."""

    name = "structural"
    targets = (aten.cat.default, aten.stack.default, aten.concat.default)

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        primal = emit.copy(node)
        parts = node.args[0]
        if all(emit.tangent(part) is None for part in parts):
            return primal, None
        tangents = [emit.tangent_or_zeros(part) for part in parts]
        return primal, emit.copy_with(node, 0, tangents)


@REGISTRY.register
class WhereRule(Rule):
    """``where(condition, a, b)``."""

    name = "structural"
    targets = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        primal = emit.copy(node)
        left, right = (emit.tangent(argument) for argument in node.args[1:3])
        if left is None and right is None:
            return primal, None
        condition = emit.value(node.args[0])
        return primal, emit.call(torch.where, condition, 0.0 if left is None else left, 0.0 if right is None else right)


def copied(x: Tensor, source: Tensor) -> Tensor:
    """What ``x.copy_(source)`` leaves in ``x``; torch's own functional form has no derivative."""
    return source.to(x).expand_as(x)


@REGISTRY.register
class CopyRule(Rule):
    """``x[...] = source``, made functional: linear in the source."""

    name = "structural"
    targets = (copied,)

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        primal = emit.copy(node)
        tangent = emit.tangent(node.args[1])
        return primal, None if tangent is None else emit.call(like_primal, tangent, primal)
