"""Augmentations at the model's input: the plan inserts a site, which this rule lowers in the training passes.

The input carries no tangent (hypergradients flow only through the response), so only the primal is emitted.
"""

from typing import Any

from torch import Tensor
from torch.fx import Node

from stn_fx.augment.cutout import cutout, draw_centres
from stn_fx.augment.draws import Draws
from stn_fx.augment.dropout import dropout_multiplier
from stn_fx.rules.layout import align, pack, unpack
from stn_fx.rules.rule import REGISTRY, Emitter, Rule


def cutout_site(x: Tensor) -> Tensor:
    """Marks an image input that cutout acts on."""
    return x


def input_dropout_site(x: Tensor) -> Tensor:
    """Marks an input whose elements are dropped."""
    return x


def apply_cutout(
    x: Tensor, holes: Tensor, length: Tensor, max_holes: int, layout: Any, draws: Draws, name: str
) -> Tensor:
    """Cutout with holes and length per example, both (B,)."""
    stack = unpack(x, layout)  # (B, n, C, H, W): n images an example
    images = stack.flatten(0, 1)
    centres = draw_centres(images, max_holes, draws, name)
    copies = stack.shape[1]
    done = cutout(images, holes.repeat_interleave(copies), length.repeat_interleave(copies), centres)
    return pack(done.reshape(stack.shape), layout)


def apply_input_dropout(x: Tensor, rate: Tensor, layout: Any, draws: Draws, name: str) -> Tensor:
    """Input dropout with one rate per example, (B,)."""
    return x * dropout_multiplier(x, align(rate.to(x.dtype), layout, x.ndim), draws, name)


class _InputRule(Rule):
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
class CutoutRule(_InputRule):
    """Cutout (DeVries & Taylor 2017)."""

    name = "cutout"
    site = "cutout"
    targets = (cutout_site,)

    def base(self, emit: Emitter, node: Node) -> Any:
        x, holes, length = emit.value(node.args[0]), emit.rate(node, "holes"), emit.rate(node, "length")
        most = emit.upper_bound(node, "holes")
        return emit.call(apply_cutout, x, holes, length, most, emit.layout(node), emit.draws, emit.site_name(node))


@REGISTRY.register
class InputDropoutRule(_InputRule):
    """Dropout of input elements."""

    name = "input dropout"
    site = "input_dropout"
    targets = (input_dropout_site,)

    def base(self, emit: Emitter, node: Node) -> Any:
        x, rate = emit.value(node.args[0]), emit.rate(node)
        return emit.call(apply_input_dropout, x, rate, emit.layout(node), emit.draws, emit.site_name(node))
