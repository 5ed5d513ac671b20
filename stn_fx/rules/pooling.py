"""Max pooling: the tangent follows the places of the maxima."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from stn_fx.rules.rule import REGISTRY, Emitter, Rule

aten = torch.ops.aten


def gather_maxima(tangent: Tensor, indices: Tensor) -> Tensor:
    """Tangent at the flat spatial ``indices`` of the maxima, (..., *out_spatial) from (..., *in_spatial)."""
    spatial = 2 if indices.ndim >= 3 else 1
    flat = tangent.flatten(-spatial).gather(-1, indices.flatten(-spatial))
    return flat.reshape(indices.shape)


@REGISTRY.register
class MaxPoolRule(Rule):
    """``max_pool2d`` and ``adaptive_max_pool2d``."""

    name = "pooling"
    targets = (aten.max_pool2d.default, aten.adaptive_max_pool2d.default, aten.max_pool2d_with_indices.default)

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        tangent = emit.tangent(node.args[0])
        if tangent is None:
            return emit.copy(node), None
        pooled = emit.call(
            aten.max_pool2d_with_indices.default if node.target is aten.max_pool2d.default else node.target,
            *[emit.value(argument) for argument in node.args],
            **{name: emit.value(value) for name, value in node.kwargs.items()},
        )
        values, indices = emit.item(pooled, 0), emit.item(pooled, 1)
        followed = emit.call(gather_maxima, tangent, indices)
        if node.target is aten.max_pool2d.default:
            return values, followed
        return pooled, [followed, None]
