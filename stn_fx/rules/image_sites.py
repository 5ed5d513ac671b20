"""Augmentations of image inputs (B, C, H, W), each with own parameters for every example.

Sites of one family that follow each other are lowered by the last one: all geometric maps in one sampling of the
images, all colour operations in few passes over memory.
"""

from typing import Any

from torch import Tensor
from torch.fx import Node

from stn_fx.augment.blur import draw_sigma, gaussian_blur
from stn_fx.augment.colour import colour, draw_colour
from stn_fx.augment.cutout import cutout, draw_centres
from stn_fx.augment.draws import Draws
from stn_fx.augment.erasing import draw_boxes, erase
from stn_fx.augment.geometry import draw_affine, horizontal_flip, warp
from stn_fx.augment.image_format import ImageFormat
from stn_fx.rules.input_sites import InputRule
from stn_fx.rules.markers import marks
from stn_fx.rules.rule import REGISTRY, Emitter


@marks("rotation", "translation", "scaling", "shear", "horizontal_flip")
def geometry_site(x: Tensor, entry: str) -> Tensor:
    """Marks images that a geometric augmentation, named by its catalogue entry, acts on."""
    return x


@marks("brightness", "contrast", "saturation", "hue")
def colour_site(x: Tensor, entry: str, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Marks images of this normalisation that a colour operation, named by its catalogue entry, acts on."""
    return x


@marks("gaussian_blur")
def gaussian_blur_site(x: Tensor) -> Tensor:
    """Marks images that are blurred."""
    return x


@marks("random_erasing")
def random_erasing_site(x: Tensor) -> Tensor:
    """Marks images that lose a rectangle."""
    return x


@marks("cutout")
def cutout_site(x: Tensor) -> Tensor:
    """Marks images that cutout acts on."""
    return x


def apply_geometry(x: Tensor, strengths: dict[str, Tensor], draws: Draws, name: str) -> Tensor:
    """All geometric augmentations in one sampling; strengths (B,) by catalogue entry."""
    if tuple(strengths) == ("horizontal_flip",):
        return horizontal_flip(x, strengths["horizontal_flip"], draws, f"{name}.horizontal_flip")
    return warp(x, draw_affine(x, strengths, draws, name))


def apply_colour(
    x: Tensor, strengths: dict[str, Tensor], mean: tuple[float, ...], std: tuple[float, ...], draws: Draws, name: str
) -> Tensor:
    """All colour operations; strengths (B,) by catalogue entry."""
    return colour(x, ImageFormat(mean, std), **draw_colour(x, strengths, draws, name))


def apply_gaussian_blur(x: Tensor, sigma: Tensor, radius: int, draws: Draws, name: str) -> Tensor:
    """Gaussian blur of standard deviations up to sigma (B,)."""
    return gaussian_blur(x, draw_sigma(x, sigma, draws, name), radius)


def apply_random_erasing(x: Tensor, probability: Tensor, area: Tensor, draws: Draws, name: str) -> Tensor:
    """Random erasing with probability and largest area per example, both (B,)."""
    return erase(x, draw_boxes(x, probability, area, draws, name))


def apply_cutout(x: Tensor, holes: Tensor, length: Tensor, max_holes: int, draws: Draws, name: str) -> Tensor:
    """Cutout with holes and length per example, both (B,)."""
    return cutout(x, holes, length, draw_centres(x, max_holes, draws, name))


class _FamilyRule(InputRule):
    """Sites whose operations are fused: the last of a chain emits for all, the others hand the input on."""

    def base(self, emit: Emitter, node: Node) -> Any:
        if all(user.target is node.target for user in node.users):
            return emit.value(node.args[0])
        chain = [node]
        while chain[0].args[0].target is node.target:
            chain.insert(0, chain[0].args[0])
        strengths = {each.args[1]: emit.rate(each) for each in chain}
        return self.fused(emit, node, emit.value(chain[0].args[0]), strengths)

    def fused(self, emit: Emitter, last: Node, x: Any, strengths: dict[str, Any]) -> Any:
        """Emit the family's operation; `strengths` in the order of the chain."""
        raise NotImplementedError


@REGISTRY.register
class GeometryRule(_FamilyRule):
    """Rotation, translation, scaling, shear and flip as one affine map."""

    name = "affine map"
    targets = (geometry_site,)

    def fused(self, emit: Emitter, last: Node, x: Any, strengths: dict[str, Any]) -> Any:
        return emit.call(apply_geometry, x, strengths, emit.draws, emit.site_name(last))


@REGISTRY.register
class ColourRule(_FamilyRule):
    """Brightness, contrast, saturation and hue on what the pixels mean."""

    name = "colour"
    targets = (colour_site,)

    def fused(self, emit: Emitter, last: Node, x: Any, strengths: dict[str, Any]) -> Any:
        return emit.call(apply_colour, x, strengths, *last.args[2:4], emit.draws, emit.site_name(last))


@REGISTRY.register
class GaussianBlurRule(InputRule):
    """Gaussian blur."""

    name = "Gaussian blur"
    targets = (gaussian_blur_site,)
    deviations = 3
    """The kernel reaches so many of the largest standard deviation that the bounds allow."""

    def base(self, emit: Emitter, node: Node) -> Any:
        radius = self.deviations * emit.upper_bound(node, "sigma")
        x, sigma = emit.value(node.args[0]), emit.rate(node)
        return emit.call(apply_gaussian_blur, x, sigma, radius, emit.draws, emit.site_name(node))


@REGISTRY.register
class RandomErasingRule(InputRule):
    """Random erasing (Zhong et al. 2017)."""

    name = "random erasing"
    targets = (random_erasing_site,)

    def base(self, emit: Emitter, node: Node) -> Any:
        x, probability, area = emit.value(node.args[0]), emit.rate(node, "probability"), emit.rate(node, "area")
        return emit.call(apply_random_erasing, x, probability, area, emit.draws, emit.site_name(node))


@REGISTRY.register
class CutoutRule(InputRule):
    """Cutout (DeVries & Taylor 2017)."""

    name = "cutout"
    targets = (cutout_site,)

    def base(self, emit: Emitter, node: Node) -> Any:
        x, holes, length = emit.value(node.args[0]), emit.rate(node, "holes"), emit.rate(node, "length")
        most = emit.upper_bound(node, "holes")
        return emit.call(apply_cutout, x, holes, length, most, emit.draws, emit.site_name(node))
