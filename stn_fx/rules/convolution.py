"""Convolutions and transposed convolutions in one, two and three dimensions, with groups, strides and padding modes.

Row-wise: the convolution with ``U`` as its kernel, each output channel scaled per example.  Low-rank: a convolution
with the r kernels of ``B``, scaled, and a 1x1 convolution with ``A``.  A transposed convolution has its outputs on
axis 1 of the weight, and with groups they are spread over the groups; there, and with groups that make low rank no
smaller than the layer, the response is row-wise.  Padding modes other than zeros are a ``pad`` node of their own.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from stn_fx.rules.layout import scale_inputs
from stn_fx.rules.rule import REGISTRY, Emitter, Rule, StructuredChange
from stn_fx.rules.weighted import add_scaled, add_terms, bias_term

aten = torch.ops.aten


def low_rank_convolution(
    convolution: Any, x: Tensor, A: Tensor, B: Tensor, scales: Tensor, layout: Any, geometry: dict[str, Any]
) -> Tensor:
    """Convolution with the kernels A diag(s) B: r kernels for every group, scaled, then mixed by A."""
    groups = geometry.get("groups", 1)
    kernels = B.repeat(groups, *(1,) * (B.ndim - 1)) if groups > 1 else B
    hidden = convolution(x, kernels, None, **geometry)
    hidden = scale_inputs(hidden, scales.repeat(1, groups) if groups > 1 else scales, layout, 1)
    mix = A.to(x.dtype).reshape(*A.shape, *(1,) * (B.ndim - 2))
    return _POINTWISE[B.ndim](hidden, mix, None, groups=groups)


def low_rank_transposed_convolution(
    convolution: Any, x: Tensor, A: Tensor, B: Tensor, scales: Tensor, layout: Any, geometry: dict[str, Any]
) -> Tensor:
    """The same for a transposed convolution without groups, whose weight (I, O, ...) has B of shape (r, I, ...)."""
    hidden = scale_inputs(convolution(x, B.transpose(0, 1), None, **geometry), scales, layout, 1)
    mix = A.to(x.dtype).reshape(*A.shape, *(1,) * (B.ndim - 2))
    return _POINTWISE[B.ndim](hidden, mix, None)


_POINTWISE = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}


class _Convolution(Rule):
    per_example_arguments = ("bias",)
    name = "convolution"
    outputs_axis = 0
    geometry_names: tuple[str, ...] = ("stride", "padding", "dilation", "groups")

    def weight_axes(self, node: Node, position: int, rank: int) -> tuple[int, ...]:
        return (self.outputs_axis,) if position == 1 else ()

    def geometry(self, emit: Emitter, node: Node) -> dict[str, Any]:
        """Stride, padding, dilation and groups, as far as the captured call gives them."""
        given = {name: emit.argument(node, name) for name in self.geometry_names}
        return {name: value for name, value in given.items() if value is not None}

    def _plain(self, emit: Emitter, node: Node, x: Node, weight: Node) -> Node:
        return emit.call(node.target, x, weight, None, **self.geometry(emit, node))

    def _weight_term(self, emit: Emitter, node: Node, x: Node, change: StructuredChange, total: Any) -> Any:
        if change.left is None:
            rows = self._plain(emit, node, x, change.factor)
            return add_scaled(emit, total, rows, change.scales, emit.layout(node), 1)
        term = emit.call(
            low_rank_convolution, node.target, x, change.left, change.factor, change.scales, emit.layout(node),
            self.geometry(emit, node),
        )  # fmt: skip
        return add_terms(emit, total, term)

    def respond(self, emit: Emitter, node: Node) -> Any:
        bias = emit.argument(node, "bias")
        total = emit.copy(node, bias=None) if emit.stack(bias) is not None else emit.copy(node)
        for change in emit.structured(node.args[1]):
            total = self._weight_term(emit, node, emit.value(node.args[0]), change, total)
        return bias_term(emit, node, bias, total, 1)

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        x, weight, bias = node.args[0], node.args[1], emit.argument(node, "bias")
        primal = emit.copy(node)
        total = None
        if emit.tangent(x) is not None:
            total = self._plain(emit, node, emit.tangent(x), emit.value(weight))
        if emit.tangent(weight) is not None:
            total = add_terms(emit, total, self._plain(emit, node, emit.value(x), emit.tangent(weight)))
        for change in emit.structured(weight):
            total = self._weight_term(emit, node, emit.value(x), change, total)
        return primal, bias_term(emit, node, bias, total, 1)


@REGISTRY.register
class ConvolutionRule(_Convolution):
    """``conv1d/2d/3d``, weight (O, I/groups, ...)."""

    targets = (
        aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
        aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
    )  # fmt: skip


@REGISTRY.register
class TransposedConvolutionRule(_Convolution):
    """``conv_transpose1d/2d/3d``, weight (I, O/groups, ...): with groups, row o of the weight serves every group."""

    name = "transposed convolution"
    targets = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
    outputs_axis = 1
    geometry_names = ("stride", "padding", "output_padding", "groups", "dilation")

    def _weight_term(self, emit: Emitter, node: Node, x: Node, change: StructuredChange, total: Any) -> Any:
        groups = emit.argument(node, "groups", 1)
        scales = emit.call(repeat_columns, change.scales, groups) if groups > 1 else change.scales
        if change.left is None:
            rows = self._plain(emit, node, x, change.factor)
            return add_scaled(emit, total, rows, scales, emit.layout(node), 1)
        term = emit.call(
            low_rank_transposed_convolution, node.target, x, change.left, change.factor, scales, emit.layout(node),
            self.geometry(emit, node),
        )  # fmt: skip
        return add_terms(emit, total, term)


def repeat_columns(scales: Tensor, groups: int) -> Tensor:
    """Row scales (B, O/groups) for all groups' outputs, (B, O): the groups share the weight's rows."""
    return scales.repeat(1, groups)
