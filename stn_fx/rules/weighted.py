"""Emission that every layer with a weight and a bias shares: sums of terms, scaled rows, per-example biases."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from stn_fx.rules.layout import add_scaled_rows, align, scale_rows
from stn_fx.rules.rule import Emitter

aten = torch.ops.aten


def add_terms(emit: Emitter, total: Node | None, term: Node | None) -> Node | None:
    """``total + term`` where None is zero."""
    if total is None or term is None:
        return term if total is None else total
    return emit.call(aten.add.Tensor, total, term)


def add_scaled(
    emit: Emitter, total: Node | None, values: Node, scales: Node, layout: tuple[int, int, int], channel_axis: int
) -> Node:
    """``total + scales * values``, rows along ``channel_axis``."""
    if total is None:
        return emit.call(scale_rows, values, scales, layout, channel_axis)
    return emit.call(add_scaled_rows, total, values, scales, layout, channel_axis)


def aligned(emit: Emitter, node: Node, stack: Node, channel_axis: int = -1) -> Node:
    """A stack of channel vectors (or of values that broadcast from the right), aligned to the output of ``node``."""
    rank = emit.rank(node)
    trailing = rank - 1 - (channel_axis % rank)
    if trailing:  # (B, C) -> (B, C, 1, 1): channels are not the last axis
        stack = emit.call(with_trailing_axes, stack, trailing)
    return emit.call(align, stack, emit.layout(node), rank)


def with_trailing_axes(stack: Tensor, count: int) -> Tensor:
    """The tensor with ``count`` axes of size 1 behind."""
    return stack.reshape(*stack.shape, *(1,) * count)


def scaled_table(factor: Tensor, scales_BO: Tensor, row_axis: int, layout: tuple[int, int, int], ndim: int) -> Tensor:
    """``diag(s_i) U`` of every example, where ``factor`` (U) broadcasts against values of this layout and rank."""
    rows = [1] * factor.ndim
    rows[row_axis] = scales_BO.shape[1]
    return align(scales_BO.reshape(-1, *rows), layout, ndim) * factor


def bias_term(emit: Emitter, node: Node, bias: Any, total: Node | None, channel_axis: int) -> Node | None:
    """Add a bias that differs per example: its change (linearized) or its value (response pass)."""
    stack = emit.stack(bias)
    if stack is None:
        return total
    return add_terms(emit, total, aligned(emit, node, stack, channel_axis))
