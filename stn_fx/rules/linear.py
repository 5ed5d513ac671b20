"""Linear layers: ``linear``, ``addmm``, ``mm`` and ``matmul`` with a weight matrix.

The operator is linear in its weight, so the weight's term is the layer applied with the response's factor and scaled:
row-wise ``s_i * (x U^T)``, low-rank ``((x B^T) * s_i) A^T``.  Where the response scales the layer's *input* features
(a decoder tied to an embedding), it is ``(x * s_i) U^T``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from stn_fx.rules.layout import scale_inputs
from stn_fx.rules.rule import REGISTRY, Emitter, Rule, StructuredChange
from stn_fx.rules.weighted import add_scaled, add_terms, bias_term

aten = torch.ops.aten


def low_rank_linear(x: Tensor, A: Tensor, B: Tensor, scales: Tensor, layout: Any, rows_are_outputs: bool) -> Tensor:
    """``((x B^T) * s) A^T`` for a weight A diag(s) B; the other way round where rows are the layer's inputs."""
    if rows_are_outputs:
        return scale_inputs(x @ B.t(), scales, layout, -1) @ A.t().to(x.dtype)
    return scale_inputs(x @ A.to(x.dtype), scales, layout, -1) @ B


class _MatrixRule(Rule):
    """Shared by the operators below, which differ in where input, weight and bias stand."""

    per_example_arguments = ("bias",)
    input_at, weight_at, bias_at = 0, 1, 2
    outputs_axis = 0  # of the weight
    name = "linear"

    def weight_axes(self, node: Node, position: int, rank: int) -> tuple[int, ...]:
        if position != self.weight_at or rank < 2:
            return ()
        # Of several matrices, the features of the output that they have in common.
        return (self.outputs_axis, 1 - self.outputs_axis) if rank == 2 else (rank - 1,)

    def is_table(self, node: Node, position: int) -> bool:
        return position == self.weight_at and node.args[position].meta["val"].ndim > 2

    def _bias(self, node: Node) -> Any:
        return node.args[self.bias_at] if self.bias_at is not None and len(node.args) > self.bias_at else None

    def _product(self, emit: Emitter, x: Node, weight: Node) -> Node:
        if self.outputs_axis == 0:
            return emit.call(aten.linear.default, x, weight)
        return emit.call(aten.matmul.default, x, weight)

    def _weight_term(self, emit: Emitter, node: Node, total: Node | None) -> Node | None:
        for change in emit.structured(node.args[self.weight_at]):
            total = self._add_change(emit, node, change, total)
        return total

    def _add_change(self, emit: Emitter, node: Node, change: StructuredChange, total: Any) -> Any:
        x, input_layout = emit.value(node.args[self.input_at]), emit.layout(node.args[self.input_at])
        rows_are_outputs = change.row_axis == self.outputs_axis or emit.rank(node.args[self.weight_at]) > 2
        if change.left is not None:
            term = emit.call(
                low_rank_linear, x, change.left, change.factor, change.scales, input_layout, rows_are_outputs
            )
            return add_terms(emit, total, term)
        if rows_are_outputs:
            rows = self._product(emit, x, change.factor)
            return add_scaled(emit, total, rows, change.scales, emit.layout(node), -1)
        scaled = emit.call(scale_inputs, x, change.scales, input_layout, -1)
        return add_terms(emit, total, self._product(emit, scaled, change.factor))

    def respond(self, emit: Emitter, node: Node) -> Any:
        x, weight, bias = node.args[self.input_at], node.args[self.weight_at], self._bias(node)
        if emit.stack(bias) is None:
            product = emit.copy(node)
        else:
            product = self._product(emit, emit.value(x), emit.value(weight))
        total = self._weight_term(emit, node, product)
        return bias_term(emit, node, bias, total, -1)

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        x, weight, bias = node.args[self.input_at], node.args[self.weight_at], self._bias(node)
        primal = emit.copy(node)
        total = None
        if emit.tangent(x) is not None:
            total = self._product(emit, emit.tangent(x), emit.value(weight))
        if emit.tangent(weight) is not None:  # an activation serves as the weight
            total = add_terms(emit, total, self._product(emit, emit.value(x), emit.tangent(weight)))
        if emit.tangent(bias) is not None:
            total = add_terms(emit, total, emit.tangent(bias))
        total = self._weight_term(emit, node, total)
        return primal, bias_term(emit, node, bias, total, -1)


@REGISTRY.register
class LinearRule(_MatrixRule):
    """``linear(x, W, b)``, W (O, I)."""

    targets = (aten.linear.default,)


@REGISTRY.register
class MatmulRule(_MatrixRule):
    """``matmul(x, W)`` and ``mm``, W (I, O)."""

    targets = (aten.matmul.default, aten.mm.default)
    outputs_axis = 1
    bias_at = None  # type: ignore[assignment]


@REGISTRY.register
class AddmmRule(_MatrixRule):
    """``addmm(b, x, W)``, W (I, O): all of GPT-2."""

    targets = (aten.addmm.default,)
    per_example_arguments = ("self",)
    input_at, weight_at, bias_at = 1, 2, 0
    outputs_axis = 1

    def covers(self, node: Node) -> bool:
        return bool(node.kwargs.get("alpha", 1) == 1 and node.kwargs.get("beta", 1) == 1)
