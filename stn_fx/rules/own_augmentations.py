"""Augmentations that stand in the model's own forward and are tuned: the catalogue's take their place, per example."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from stn_fx.errors import CaptureError
from stn_fx.rules.image_sites import apply_geometry
from stn_fx.rules.input_sites import InputRule, apply_gaussian_noise
from stn_fx.rules.rule import REGISTRY, Emitter


@torch.library.custom_op("stn_fx::own_augmentation", mutates_args=())
def augmentation_marker(x: Tensor, name: str, entry: str, value: float) -> Tensor:
    """Stands for the augmentation of this name, which does at this value what the catalogue entry does."""
    return x.clone()


@augmentation_marker.register_fake
def _(x: Tensor, name: str, entry: str, value: float) -> Tensor:
    return torch.empty_like(x)


@REGISTRY.register
class OwnAugmentationRule(InputRule):
    """An augmentation of the model's own with a rate for each example."""

    name = "the model's own augmentation"
    site = "augmentation"
    targets = (torch.ops.stn_fx.own_augmentation.default,)

    def own_rate(self, node: Node) -> float:
        """The value that the model's author gave."""
        return float(node.args[3])  # type: ignore[arg-type]

    def base(self, emit: Emitter, node: Node) -> Any:
        x, rate, name, entry = emit.value(node.args[0]), emit.rate(node), emit.site_name(node), node.args[2]
        if entry == "gaussian_noise":
            return emit.call(apply_gaussian_noise, x, rate, emit.layout(node), emit.draws, name)
        if emit.rank(node) != 4 or emit.layout(node) != (0, 1, 1):
            raise CaptureError(
                f"{node.args[1]} acts on a value of {emit.rank(node)} axes, and {entry} is tuned on images "
                f"(B, C, H, W) only. Leave {entry} out of hparams, or choose other places with a pattern."
            )
        return emit.call(apply_geometry, x, {entry: rate}, emit.draws, name)

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        if emit.tangent(node.args[0]) is not None:
            raise CaptureError(
                f"{node.args[1]} stands behind trained layers, and {node.args[2]} is tuned on inputs only. Move it "
                f"before them, or leave {node.args[2]} out of hparams for it with a pattern."
            )
        return super().linearize(emit, node)
