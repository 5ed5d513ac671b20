"""Layers of the dependency probe, thinned: fewer input features, the same rows depend on the same rows.

A convolution or matrix product sums over all input features of a row, so that a NaN in any of them reaches every output
feature.  The mean over a share of the features passes that on just as well as the features do, and what the operator
does to rows and positions stays its own.  The probe thus never reads, copies or draws a large weight.
"""

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten

SHARES = 2
"""Input features that are left (per group): more than one, so that rows remain that are no multiples of each other."""
ENTRIES = 64
"""Rows that are left of an embedding."""
PERIOD = 8191

_CONVOLUTIONS = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
}  # fmt: skip
_TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
_PRODUCTS = {aten.linear.default: (0, 1), aten.mm.default: (0, 1), aten.matmul.default: (0, 1),
             aten.addmm.default: (1, 2)}  # fmt: skip
"""Positions of the activation and of the weight."""


def draw(shape: tuple[int, ...], like: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Random numbers from 0.5 to 1.5 times ``scale``, repeated with a prime period: drawing all would take longer than
    all the rest of an analysis of large layers.
    """
    size = torch.Size(shape).numel()
    few = torch.rand(min(PERIOD, size), generator=generator).add_(0.5).mul_(scale).to(like)
    return few.repeat(-(-size // max(1, len(few))))[:size].view(shape)


def weight_of(node: Node, batched: Container[Node]) -> Node | None:
    """The weight of an operator that `run_thinned` runs, which it only asks for its shape; None for other operators.

    ``batched`` are the nodes that depend on examples: a weight among them matters.
    """
    if node.target is aten.embedding.default:
        x, weight = node.args[1], node.args[0]
    elif node.target in _CONVOLUTIONS or node.target in _TRANSPOSED:
        x, weight = node.args[0], node.args[1]
    elif node.target in _PRODUCTS:
        x, weight = (node.args[position] for position in _PRODUCTS[node.target])
    else:
        return None
    if node.kwargs or not isinstance(x, Node) or not isinstance(weight, Node) or weight in batched:
        return None
    value, weight_value = x.meta["val"], weight.meta["val"]
    if not weight_value.is_floating_point() or not weight_value.numel():
        return None
    if node.target is aten.embedding.default:
        return weight
    if not value.is_floating_point() or value.ndim < 2:
        return None
    if node.target in _PRODUCTS:
        return weight if weight_value.ndim == 2 and isinstance(value.shape[-1], int) else None
    # One axis less is a convolution of a single example, whose channels are on axis 0.
    return weight if value.ndim == weight_value.ndim and isinstance(value.shape[1], int) else None


def run_thinned(node: Node, arguments: tuple[Any, ...], generator: torch.Generator) -> Tensor:
    """A value with the shape of the node's and NaN in the same places; ``arguments`` are its arguments' values."""
    if node.target is aten.embedding.default:
        weight, index = arguments[:2]
        entries = min(ENTRIES, weight.shape[0])
        value: Tensor = node.target(draw((entries, *weight.shape[1:]), weight, 1.0, generator), index % entries)
    elif node.target in _PRODUCTS:
        value = _product(node, list(arguments), generator)
    else:
        value = _convolution(node, arguments, generator)
    return value


def _product(node: Node, arguments: list[Any], generator: torch.Generator) -> Tensor:
    position, weight_position = _PRODUCTS[node.target]
    x, weight = arguments[position], arguments[weight_position]
    transposed = node.target is aten.linear.default  # features of the output first
    thin = _shares(x, -1)
    size = (weight.shape[0], thin.shape[-1]) if transposed else (thin.shape[-1], weight.shape[1])
    arguments[position] = thin
    arguments[weight_position] = draw(size, x, 1 / max(1, thin.shape[-1]), generator)
    return node.target(*arguments)


def _convolution(node: Node, arguments: tuple[Any, ...], generator: torch.Generator) -> Tensor:
    x, weight, *rest = arguments
    transposed = node.target in _TRANSPOSED
    groups = x.shape[1] // weight.shape[1] if not transposed else arguments[6] if len(arguments) > 6 else 1
    thin = _shares(x.unflatten(1, (groups, -1)), 2)
    size = list(weight.shape)
    size[0 if transposed else 1] = thin.shape[2] * (groups if transposed else 1)
    made = draw(tuple(size), x, 1 / (thin.shape[2] * weight[0, 0].numel()), generator)
    return node.target(thin.flatten(1, 2), made, *rest)


def _shares(x: Tensor, axis: int) -> Tensor:
    """Means over shares of the features, or all features where they are few."""
    if x.shape[axis] <= SHARES:
        return x
    return torch.stack([share.mean(axis) for share in x.tensor_split(SHARES, axis)], axis)
