"""Additive Gaussian noise on activations, inserted at the outputs of modules; its tangent is the identity's."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from stn_fx.augment.draws import Draws
from stn_fx.augment.noise import scaled_noise
from stn_fx.rules.layout import align
from stn_fx.rules.markers import marks
from stn_fx.rules.rule import REGISTRY, Emitter, Rule

aten = torch.ops.aten


@marks("noise")
def noise_site(x: Tensor) -> Tensor:
    """Marks an activation that noise is added to."""
    return x


def activation_noise(x: Tensor, std: Tensor, layout: Any, draws: Draws, name: str) -> Tensor:
    """Noise to add, shaped like ``x``, with one standard deviation per example, (B,)."""
    return scaled_noise(x, align(std, layout, x.ndim), draws, name)


@REGISTRY.register
class NoiseRule(Rule):
    """Gaussian noise on an activation."""

    name = "noise"
    targets = (noise_site,)

    def is_site(self, node: Node) -> bool:
        """Inserted by the plan, so always a site."""
        return True

    def own_rate(self, node: Node) -> float:
        """There is no noise of the author's."""
        return 0.0

    def base(self, emit: Emitter, node: Node) -> Any:
        x = emit.value(node.args[0])
        std = emit.rate(node)
        noise = emit.call(activation_noise, x, std, emit.layout(node), emit.draws, emit.site_name(node))
        return emit.call(aten.add.Tensor, x, noise)

    def respond(self, emit: Emitter, node: Node) -> Any:
        return emit.value(node.args[0])

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        return self.base(emit, node), emit.tangent(node.args[0])
