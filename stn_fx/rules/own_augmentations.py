"""Augmentations that stand in the model's own forward and are tuned: the catalogue's take their place, per example.

A module that does what several entries do has one site for each, one after the other; the last acts for all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from stn_fx.augment.blur import draw_sigma, gaussian_blur
from stn_fx.augment.draws import Draws
from stn_fx.augment.erasing import draw_boxes, erase
from stn_fx.errors import CaptureError
from stn_fx.rules.image_sites import apply_colour, apply_geometry
from stn_fx.rules.input_sites import InputRule, apply_gaussian_noise
from stn_fx.rules.rule import REGISTRY, Emitter

EXACT = ("horizontal_flip", "random_erasing")
"""Entries that move or blank pixels and compute with none: right for whole numbers too."""


@torch.library.custom_op("stn_fx::own_augmentation", mutates_args=())
def augmentation_marker(x: Tensor, name: str, entry: str, values: Sequence[float], settings: Sequence[float]) -> Tensor:
    """Stands for the augmentation of this name, which does at these values what the catalogue entry does.

    Args:
        x: what it acts on.
        name: qualified name of the module.
        entry: catalogue entry.
        values: of its components, in the entry's order.
        settings: what of the module is not tuned; for `gaussian_blur` the least standard deviation and the kernel's
            radius, for `random_erasing` the least area.
    """
    return x.clone()


@augmentation_marker.register_fake
def _(x: Tensor, name: str, entry: str, values: Sequence[float], settings: Sequence[float]) -> Tensor:
    return torch.empty_like(x)


def own_strength(x: Tensor, value: float) -> Tensor:
    """The module's own value for every example, (B,), where no hyperparameter acts."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.full((x.shape[0],), value, dtype=dtype, device=x.device)


def apply_own_blur(x: Tensor, sigma: Tensor, least: float, radius: int, draws: Draws, name: str) -> Tensor:
    """Gaussian blur of standard deviations from `least` (or sigma, where that is less) to sigma (B,)."""
    drawn = draw_sigma(x, sigma - sigma.clamp(max=least), draws, name)
    return gaussian_blur(x, drawn + sigma.clamp(max=least).detach().to(drawn.dtype), radius)


def apply_own_erasing(x: Tensor, probability: Tensor, area: Tensor, least: float, draws: Draws, name: str) -> Tensor:
    """Random erasing of shares from `least` (or the area, where that is less) to the area (B,)."""
    return erase(x, draw_boxes(x, probability, area, draws, name, least))


@REGISTRY.register
class OwnAugmentationRule(InputRule):
    """An augmentation of the model's own with a rate for each example."""

    name = "the model's own augmentation"
    site = "augmentation"
    targets = (torch.ops.stn_fx.own_augmentation.default,)

    def found_as(self, node: Node) -> tuple[str, str]:
        """Its module's name, and the entry that it stands for."""
        return str(node.args[1]), str(node.args[2])

    def own_rate(self, node: Node) -> float:
        """The value that the model's author gave to the entry's first component."""
        return self.own_values(node)[0]

    def own_values(self, node: Node) -> tuple[float, ...]:
        """The values that the model's author gave, one for each component of the entry."""
        return tuple(node.args[3])

    def base(self, emit: Emitter, node: Node) -> Any:
        if any(_continues(user, node) for user in node.users):
            return emit.value(node.args[0])
        chain = [node]
        while _continues(chain[0], chain[0].args[0]):
            chain.insert(0, chain[0].args[0])
        x, name, entry = emit.value(chain[0].args[0]), emit.site_name(node), node.args[2]
        if entry == "gaussian_noise":
            return emit.call(apply_gaussian_noise, x, _rate(emit, node, x), emit.layout(node), emit.draws, name)
        if emit.rank(node) != 4 or emit.layout(node) != (0, 1, 1):
            raise CaptureError(
                f"{node.args[1]} acts on a value of {emit.rank(node)} axes, and {entry} is tuned on images "
                f"(B, C, H, W) only. Leave {entry} out of hparams, or choose other places with a pattern."
            )
        if not emit.floating(chain[0].args[0]) and entry not in EXACT:
            raise CaptureError(
                f"{node.args[1]} acts on images of whole numbers, and {entry} is tuned on floating ones only, whose "
                f"range is known. Put torchvision.transforms.v2.ToDtype(torch.float32, scale=True) before it, or leave "
                f"{entry} out of hparams for it with a pattern."
            )
        settings = node.args[4]
        if entry == "gaussian_blur":
            least, radius = settings[0], int(settings[1])
            return emit.call(apply_own_blur, x, _rate(emit, node, x), least, radius, emit.draws, name)
        if entry == "random_erasing":
            probability, area = _rate(emit, node, x), _rate(emit, node, x, 1, "area")
            return emit.call(apply_own_erasing, x, probability, area, settings[0], emit.draws, name)
        strengths = {each.args[2]: _rate(emit, each, x) for each in chain}
        if entry in ("brightness", "contrast", "saturation", "hue"):
            # These modules take pixels in [0, 1], whatever the format of the model's inputs.
            return emit.call(apply_colour, x, strengths, (0.0,), (1.0,), emit.draws, name)
        return emit.call(apply_geometry, x, strengths, emit.draws, name)

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        if emit.tangent(node.args[0]) is not None:
            raise CaptureError(
                f"{node.args[1]} stands behind trained layers, and {node.args[2]} is tuned on inputs only. Move it "
                f"before them, or leave {node.args[2]} out of hparams for it with a pattern."
            )
        return super().linearize(emit, node)


def _continues(node: Node, before: Any) -> bool:
    """Whether `node` is the next site of the module that `before` is a site of."""
    both = isinstance(before, Node) and before.target is node.target and node.args[0] is before
    return both and node.args[1] == before.args[1] and node.args[2] != before.args[2]


def _rate(emit: Emitter, node: Node, x: Any, position: int = 0, part: str = "") -> Any:
    """What acts at this site: a hyperparameter (B,), else the module's own value."""
    rate = emit.rate(node, part)
    return emit.call(own_strength, x, float(node.args[3][position])) if rate is None else rate
