"""Element-wise operators: sums and products that broadcast, and non-linear functions of one tensor."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from stn_fx.rules.layout import align
from stn_fx.rules.rule import REGISTRY, Emitter, Rule
from stn_fx.rules.tangent import pointwise
from stn_fx.rules.weighted import add_terms, scaled_table

aten = torch.ops.aten


class _Broadcast(Rule):
    """Operators on two broadcast operands; a parameter that differs per example is aligned with the batch."""

    per_example_arguments = ("self", "other")
    name = "element-wise"

    def weight_axes(self, node: Node, position: int, rank: int) -> tuple[int, ...]:
        if position > 1 or rank < 2:
            return ()
        # Features first, as embeddings; along an axis of one row, every hyperparameter would have the same direction.
        shape = node.args[position].meta["val"].shape
        return tuple(axis for axis in reversed(range(rank)) if shape[axis] != 1)

    def is_table(self, node: Node, position: int) -> bool:
        return True

    def change(self, emit: Emitter, node: Node, argument: Any) -> Node | None:
        """Tangent of an operand: an activation's, or a parameter's change aligned to the output."""
        stack = emit.stack(argument)
        if stack is not None:
            return emit.call(align, stack, emit.layout(node), emit.rank(node))
        total = None
        for table in emit.structured(argument):
            layout, rank = emit.layout(node), emit.rank(node)
            change = emit.call(scaled_table, table.factor, table.scales, table.row_axis, layout, rank)
            total = add_terms(emit, total, change)
        return emit.tangent(argument) if total is None else total

    def respond(self, emit: Emitter, node: Node) -> Node:
        operands = {}
        for index, argument in enumerate(node.args[:2]):
            if emit.structured(argument):
                operands[index] = add_terms(emit, emit.value(argument), self.change(emit, node, argument))
            elif emit.stack(argument) is not None:
                operands[index] = self.change(emit, node, argument)
        return emit.copy(node, **{emit.argument_name(node, index): value for index, value in operands.items()})


@REGISTRY.register
class SumRule(_Broadcast):
    """``add``, ``sub``, ``rsub`` of tensors or numbers."""

    targets = (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar)

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        primal = emit.copy(node)
        alpha = emit.argument(node, "alpha", 1)
        reverse = node.target in (aten.rsub.Tensor, aten.rsub.Scalar)
        signs = (-alpha, 1) if reverse else (1, alpha if "add" in node.target.name() else -alpha)
        total = None
        for sign, argument in zip(signs, node.args[:2], strict=True):
            change = self.change(emit, node, argument)
            if change is None:
                continue
            change = change if sign == 1 else emit.call(aten.mul.Scalar, change, sign)
            total = add_terms(emit, total, change)
        if total is None:
            return primal, None
        return primal, emit.call(like_primal, total, primal)


def like_primal(tangent: Tensor, primal: Tensor) -> Tensor:
    """The tangent in the primal's shape and dtype (an operand may be smaller than the result)."""
    tangent = tangent if tangent.dtype == primal.dtype else tangent.to(primal.dtype)
    return tangent if tangent.shape == primal.shape else tangent.expand_as(primal)


@REGISTRY.register
class ProductRule(_Broadcast):
    """``mul`` and ``div``."""

    targets = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        left, right = node.args[:2]
        primal = emit.copy(node)
        quotient = node.target in (aten.div.Tensor, aten.div.Scalar)
        left_change, right_change = self.change(emit, node, left), self.change(emit, node, right)
        operator = aten.div.Tensor if quotient else aten.mul.Tensor
        total = None
        if left_change is not None:
            total = emit.call(operator, left_change, emit.value(right))
        if right_change is not None:
            if quotient:  # d(l/r) = -(l/r) dr / r
                scaled = emit.call(aten.div.Tensor, emit.call(aten.mul.Tensor, primal, right_change), emit.value(right))
                term = emit.call(aten.neg.default, scaled)
            else:
                term = emit.call(aten.mul.Tensor, emit.value(left), right_change)
            total = add_terms(emit, total, term)
        return primal, None if total is None else emit.call(like_primal, total, primal)


@REGISTRY.register
class ReluRule(Rule):
    """``relu``: its backward kernel is the tangent, with only the output kept."""

    name = "activation"
    targets = (aten.relu.default,)

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        primal = emit.copy(node)
        tangent = emit.tangent(node.args[0])
        return primal, None if tangent is None else emit.call(aten.threshold_backward.default, tangent, primal, 0)


_POINTWISE = (
    "relu6", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "tanh", "elu", "selu", "celu",
    "leaky_relu", "softplus", "log_sigmoid", "exp", "expm1", "log", "log1p", "log2", "sqrt", "rsqrt", "abs",
    "square", "reciprocal", "erf", "sin", "cos", "clamp", "clamp_min", "clamp_max", "threshold", "hardshrink",
    "softshrink", "logit", "sinh", "cosh", "atan",
)  # fmt: skip
_POINTWISE_TARGETS = (
    *(getattr(aten, name).default for name in _POINTWISE if "default" in getattr(aten, name).overloads()),
    aten.pow.Tensor_Scalar,
)


@REGISTRY.register
class PointwiseRule(Rule):
    """A non-linear function of each element of one tensor."""

    name = "activation"
    targets = _POINTWISE_TARGETS

    def covers(self, node: Node) -> bool:
        value = node.args[0].meta.get("val") if isinstance(node.args[0], Node) else None
        return not (isinstance(value, Tensor) and value.is_complex())  # a derivative there is no one number

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        primal = emit.copy(node)
        tangent = emit.tangent(node.args[0])
        if tangent is None:
            return primal, None
        options = [emit.value(argument) for argument in node.args[1:]]
        keywords = {name: emit.value(value) for name, value in node.kwargs.items()}
        x = emit.value(node.args[0])
        return primal, emit.call(pointwise_tangent, node.target, x, tangent, options, keywords)


def pointwise_tangent(
    operator: Any, x: Tensor, tangent: Tensor, options: list[Any], keywords: dict[str, Any]
) -> Tensor:
    """Tangent of ``operator(x, *options, **keywords)``, element by element."""
    return pointwise(lambda value: operator(value, *options, **keywords), x, tangent)


@REGISTRY.register
class SoftmaxRule(Rule):
    """``softmax``: its Jacobian is symmetric, so the backward kernel is the tangent."""

    name = "softmax"
    targets = (aten.softmax.int, aten._softmax.default)

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        primal = emit.copy(node)
        tangent = emit.tangent(node.args[0])
        if tangent is None:
            return primal, None
        return primal, emit.call(softmax_tangent, tangent, primal, node.args[1])


def softmax_tangent(tangent: Tensor, probabilities: Tensor, axis: int) -> Tensor:
    """``p * (t - sum(p t))`` along ``axis``."""
    tangent = tangent.to(probabilities.dtype)
    return aten._softmax_backward_data(tangent, probabilities, axis, probabilities.dtype)
