"""Dropout in its forms: element-wise, channel-wise and alpha, in place or not, active or at p = 0.

A site draws a multiplier (and for alpha dropout a shift) outside everything that is differentiated; what follows is
``x * multiplier + shift``, so the tangent is multiplied alike.  Each example has its own rate.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from stn_fx.augment import dropout as masks
from stn_fx.augment.draws import Draws
from stn_fx.errors import InputError
from stn_fx.rules.layout import align, unpack
from stn_fx.rules.markers import marks
from stn_fx.rules.rule import REGISTRY, Emitter, Rule

aten = torch.ops.aten


@marks("dropout")
def dropout_site(x: Tensor) -> Tensor:
    """Marks a place where the plan inserts an element-wise dropout into a model that has none there."""
    return x


def multiplier(form: str, x: Tensor, rate: Any, layout: Any, draws: Draws, name: str) -> Tensor:
    """Multiplier of one dropout site, broadcastable to ``x``; ``rate`` is one number per example (B,), or for all."""
    if form == "locked":
        return _locked_multiplier(x, rate, layout, draws, name)
    noise_shape = masks.channel_shape(x) if form == "channel" else None
    return masks.dropout_multiplier(x, _aligned_rate(x, rate, layout), draws, name, noise_shape)


def _locked_multiplier(x: Tensor, rate: Tensor, layout: Any, draws: Draws, name: str) -> Tensor:
    """One mask for all time steps: the first axis of an example, or what is folded with the batch."""
    unit = list(unpack(x, layout).shape[1:])  # of one example, with what is folded at the batch's place
    time = layout[0] if unit[layout[0]] != 1 else (1 if layout[0] == 0 else 0)
    unit[time] = 1
    per_example = rate.to(x.dtype).reshape(-1, *[1] * len(unit))
    return align(masks.dropout_multiplier(x, per_example, draws, name, (len(rate), *unit)), layout, x.ndim)


def alpha_terms(form: str, x: Tensor, rate: Any, layout: Any, draws: Draws, name: str) -> tuple[Tensor, Tensor]:
    """Multiplier and shift of alpha dropout, which keeps mean and variance of SELU networks."""
    noise_shape = masks.channel_shape(x) if form == "channel-alpha" else None
    return masks.alpha_dropout_terms(x, _aligned_rate(x, rate, layout), draws, name, noise_shape)


def _aligned_rate(x: Tensor, rate: Any, layout: Any) -> Tensor:
    if isinstance(rate, Tensor):
        return align(rate.to(x.dtype), layout, x.ndim)
    return torch.full((1,) * x.ndim, rate, dtype=x.dtype, device=x.device)


_FORMS = {
    "dropout": "element", "feature_dropout": "channel", "alpha_dropout": "alpha",
    "feature_alpha_dropout": "channel-alpha", "native_dropout": "element",
}  # fmt: skip


@REGISTRY.register
class DropoutRule(Rule):
    """``dropout``, ``feature_dropout``, ``alpha_dropout``, ``feature_alpha_dropout``, and inserted sites."""

    name = "dropout"
    site = "dropout"
    targets = (
        aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
        aten.feature_alpha_dropout.default, dropout_site,
    )  # fmt: skip

    def is_site(self, node: Node) -> bool:
        """Whether this call drops anything in training: in the evaluation graph it is the identity."""
        return node.target is dropout_site or bool(node.args[2])

    def own_rate(self, node: Node) -> float:
        """The rate that the model's author gave."""
        return 0.0 if node.target is dropout_site else float(node.args[1])

    def _terms(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        rate = emit.rate(node)
        form = self._form(emit, node)
        x = emit.value(node.args[0])
        layout = emit.layout(node) if rate is not None else None
        arguments = (form, x, self.own_rate(node) if rate is None else rate, layout, emit.draws, emit.site_name(node))
        if form in ("alpha", "channel-alpha"):
            terms = emit.call(alpha_terms, *arguments)
            return emit.item(terms, 0), emit.item(terms, 1)
        return emit.call(multiplier, *arguments), None

    def _form(self, emit: Emitter, node: Node) -> str:
        form = "element" if node.target is dropout_site else _FORMS[node.target._opname]
        for option, chosen in (("locked", "locked"), ("channels", "channel")):
            if not emit.option(node, option):
                continue
            if form != "element" or emit.rank(node) < 3:
                raise InputError(
                    f"dropout({option}) cannot be applied at {emit.site_name(node)}: it is for element-wise dropout of "
                    f"values with 3 or more axes, and this is {form} dropout of {emit.rank(node)}. Choose other sites "
                    f"with a pattern, such as dropout@encoder({option})."
                )
            form = chosen
        return form

    def _idle(self, emit: Emitter, node: Node) -> bool:
        return not self.is_site(node) or (emit.rate(node) is None and self.own_rate(node) == 0)

    def base(self, emit: Emitter, node: Node) -> Any:
        return emit.value(node.args[0]) if self._idle(emit, node) else self._dropped(emit, node)[0]

    def _dropped(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        """The value with elements dropped, and the multiplier, which its change takes too."""
        factor, shift = self._terms(emit, node)
        value = emit.call(aten.mul.Tensor, emit.value(node.args[0]), factor)
        return value if shift is None else emit.call(aten.add.Tensor, value, shift), factor

    def respond(self, emit: Emitter, node: Node) -> Any:
        return emit.value(node.args[0])

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        x, tangent = emit.value(node.args[0]), emit.tangent(node.args[0])
        if self._idle(emit, node):
            return x, tangent
        primal, factor = self._dropped(emit, node)
        return primal, None if tangent is None else emit.call(aten.mul.Tensor, tangent, factor)

    def without_batch(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        """One mask for all examples: value and change are dropped alike."""
        x, stack = emit.value(node.args[0]), emit.stack(node.args[0])
        if self._idle(emit, node):
            return x, stack
        value, factor = self._dropped(emit, node)
        return value, None if stack is None else emit.call(aten.mul.Tensor, stack, factor)
