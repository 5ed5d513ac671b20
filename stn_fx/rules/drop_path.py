"""Drop path (stochastic depth): the branch of a residual block is dropped for whole examples.

Its modules draw random numbers in ways that do not survive capture as one operator, so during capture they call a
marker operator instead, which brings each into the graph as a single node.  Every marker is lowered again, also those
that no hyperparameter uses.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from stn_fx.augment import dropout as masks
from stn_fx.augment.draws import Draws
from stn_fx.rules.layout import align
from stn_fx.rules.markers import marks
from stn_fx.rules.rule import REGISTRY, Emitter, Rule

aten = torch.ops.aten


@marks("drop_path")
def drop_path_site(x: Tensor) -> Tensor:
    """Marks a residual branch where the plan inserts drop path into a model that has none there."""
    return x


@torch.library.custom_op("stn_fx::drop_path", mutates_args=())
def drop_path_marker(x: Tensor, rate: float, rescale: bool, whole_batch: bool) -> Tensor:
    """Stands for a drop-path module in a captured graph."""
    return x.clone()


@drop_path_marker.register_fake
def _(x: Tensor, rate: float, rescale: bool, whole_batch: bool) -> Tensor:
    return torch.empty_like(x)


def marked_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Forward that calls the marker, for the drop-path modules of torchvision, timm and transformers; else None."""
    rate = getattr(module, "drop_prob", None)
    kind = type(module).__name__
    if kind == "StochasticDepth" and isinstance(getattr(module, "p", None), float):
        p, mode = module.p, module.mode
        return lambda input: drop_path_marker(input, p, True, mode == "batch") if module.training else input
    if kind.endswith("DropPath") and (rate is None or isinstance(rate, (int, float))):
        rescale = bool(getattr(module, "scale_by_keep", True))
        return lambda x: drop_path_marker(x, float(rate or 0.0), rescale, False) if module.training else x
    return None


def path_multiplier(
    x: Tensor, rate: Any, layout: Any, draws: Draws, name: str, rescale: bool, whole_batch: bool
) -> Tensor:
    """One factor per example, broadcastable to ``x``: 0, or 1 (over the keep rate where the branch is rescaled)."""
    layout = (0, 1, 1) if layout is None else layout
    if not isinstance(rate, Tensor):
        rate = torch.full((x.shape[layout[0]] // (layout[1] * layout[2]),), rate, device=x.device)
    noise_shape = (1,) if whole_batch else rate.shape
    factors = masks.dropout_multiplier(x, rate.to(x.dtype), draws, name, noise_shape, scale_by_keep=rescale)
    return align(factors, layout, x.ndim)


@REGISTRY.register
class DropPathRule(Rule):
    """Drop-path markers, and inserted sites."""

    name = "drop path"
    site = "drop_path"
    targets = (torch.ops.stn_fx.drop_path.default, drop_path_site)

    def is_site(self, node: Node) -> bool:
        """Markers stand only in training graphs."""
        return True

    def own_rate(self, node: Node) -> float:
        """The rate that the model's author gave."""
        return 0.0 if node.target is drop_path_site else float(node.args[1])

    def _factor(self, emit: Emitter, node: Node) -> Any:
        rate = emit.rate(node)
        if rate is None and self.own_rate(node) == 0:
            return None
        rescale, whole_batch = (True, False) if node.target is drop_path_site else node.args[2:4]
        return emit.call(
            path_multiplier, emit.value(node.args[0]), self.own_rate(node) if rate is None else rate,
            emit.layout(node) if rate is not None else None, emit.draws, emit.site_name(node), rescale, whole_batch,
        )  # fmt: skip

    def base(self, emit: Emitter, node: Node) -> Any:
        factor, x = self._factor(emit, node), emit.value(node.args[0])
        return x if factor is None else emit.call(aten.mul.Tensor, x, factor)

    def respond(self, emit: Emitter, node: Node) -> Any:
        return emit.value(node.args[0])

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        x, tangent = emit.value(node.args[0]), emit.tangent(node.args[0])
        factor = self._factor(emit, node)
        if factor is None:
            return x, tangent
        primal = emit.call(aten.mul.Tensor, x, factor)
        return primal, None if tangent is None else emit.call(aten.mul.Tensor, tangent, factor)
