"""Augmentations of any floating input: the plan inserts a site, which a rule lowers in the training passes.

The input carries no tangent (hypergradients flow only through the response), so only the primal is emitted.
"""

from typing import Any

from torch import Tensor
from torch.fx import Node

from stn_fx.augment.draws import Draws
from stn_fx.augment.dropout import dropout_multiplier
from stn_fx.augment.noise import scaled_noise
from stn_fx.rules.layout import align
from stn_fx.rules.markers import marks
from stn_fx.rules.rule import REGISTRY, Emitter, Rule


@marks("input_dropout")
def input_dropout_site(x: Tensor) -> Tensor:
    """Marks an input whose elements are dropped."""
    return x


@marks("input_scale")
def input_scale_site(x: Tensor) -> Tensor:
    """Marks an input that is multiplied by one factor for each example."""
    return x


@marks("gaussian_noise")
def gaussian_noise_site(x: Tensor) -> Tensor:
    """Marks an input that noise is added to."""
    return x


def apply_input_dropout(x: Tensor, rate: Tensor, layout: Any, draws: Draws, name: str) -> Tensor:
    """Input dropout with one rate per example, (B,)."""
    return x * dropout_multiplier(x, align(rate.to(x.dtype), layout, x.ndim), draws, name)


def apply_input_scale(x: Tensor, strength: Tensor, layout: Any, draws: Draws, name: str) -> Tensor:
    """Input times one factor per example, uniform within its strength (B,) of 1."""
    unit_B = draws.uniform(strength.shape, x, name).mul_(2).sub_(1)
    return x * align((1 + unit_B * strength.to(unit_B.dtype)).to(x.dtype), layout, x.ndim)


def apply_gaussian_noise(x: Tensor, std: Tensor, layout: Any, draws: Draws, name: str) -> Tensor:
    """Input plus Gaussian noise with one standard deviation per example, (B,)."""
    return x + scaled_noise(x, align(std, layout, x.ndim), draws, name)


_APPLIED = {
    input_dropout_site: apply_input_dropout,
    input_scale_site: apply_input_scale,
    gaussian_noise_site: apply_gaussian_noise,
}


class InputRule(Rule):
    """What the rules of all input sites share."""

    def is_site(self, node: Node) -> bool:
        """Inserted by the plan, so always a site."""
        return True

    def own_rate(self, node: Node) -> float:
        """There is no rate of the author's."""
        return 0.0

    def respond(self, emit: Emitter, node: Node) -> Any:
        return emit.value(node.args[0])

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        return self.base(emit, node), None


@REGISTRY.register
class FloatingInputRule(InputRule):
    """Dropout, a factor, or noise on an input of any shape."""

    name = "input"
    targets = tuple(_APPLIED)

    def base(self, emit: Emitter, node: Node) -> Any:
        x, strength = emit.value(node.args[0]), emit.rate(node)
        return emit.call(_APPLIED[node.target], x, strength, emit.layout(node), emit.draws, emit.site_name(node))
