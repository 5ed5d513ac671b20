"""Scaled-dot-product attention, with per-example dropout of the attention probabilities.

Base and response pass keep the fused kernel wherever no dropout is drawn.  The fused kernels have no forward-mode rule,
so the linearized pass computes the attention explicitly; what it needs beyond the primal is four matrix products.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from stn_fx.augment.draws import Draws
from stn_fx.rules.dropout import multiplier
from stn_fx.rules.elementwise import softmax_tangent
from stn_fx.rules.layout import align
from stn_fx.rules.rule import REGISTRY, Emitter, Rule

aten = torch.ops.aten


def attention_probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor:
    """softmax(query key^T * scale + mask), (..., L, S)."""
    key = _repeat_heads(key, query, enable_gqa)
    scores = query @ key.transpose(-2, -1) * _scale(query, scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    # As the fused kernels: a row with all keys masked attends to nothing instead of being NaN.
    return torch.ops.aten._safe_softmax(scores, -1)


def attend(probabilities: Tensor, value: Tensor, factor: Tensor | None, enable_gqa: bool) -> Tensor:
    """``(probabilities * factor) value``; ``factor`` is the dropout multiplier."""
    weights = probabilities if factor is None else probabilities * factor
    return weights @ _repeat_heads(value, weights, enable_gqa)


def attention_tangent(
    primals: list[Tensor],
    tangents: list[Tensor | None],
    probabilities: Tensor,
    factor: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Tangent along those of (query, key, value, mask); None = zero."""
    query, key, value = primals
    query_t, key_t, value_t, mask_t = tangents
    scores_t = None
    if query_t is not None:
        scores_t = query_t @ _repeat_heads(key, query, enable_gqa).transpose(-2, -1) * _scale(query, scale)
    if key_t is not None:
        term = query @ _repeat_heads(key_t, query, enable_gqa).transpose(-2, -1) * _scale(query, scale)
        scores_t = term if scores_t is None else scores_t + term
    if mask_t is not None:
        scores_t = mask_t.expand_as(probabilities) if scores_t is None else scores_t + mask_t
    total = None
    if scores_t is not None:
        total = attend(softmax_tangent(scores_t, probabilities, -1), value, factor, enable_gqa)
    if value_t is not None:
        term = attend(probabilities, value_t, factor, enable_gqa)
        total = term if total is None else total + term
    assert total is not None
    return total


def _scale(query: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _repeat_heads(tensor: Tensor, like: Tensor, enable_gqa: bool) -> Tensor:
    if not enable_gqa or tensor.shape[-3] == like.shape[-3]:
        return tensor
    return tensor.repeat_interleave(like.shape[-3] // tensor.shape[-3], -3)


def attention_multiplier(probabilities: Tensor, rate: Any, layout: Any, draws: Draws, name: str) -> Tensor:
    """Dropout multiplier of the attention probabilities."""
    return multiplier("element", probabilities, rate, layout, draws, name)


@REGISTRY.register
class AttentionRule(Rule):
    """``scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)``."""

    per_example_arguments = ("attn_mask",)
    name = "attention"
    site = "dropout"
    targets = (aten.scaled_dot_product_attention.default,)

    def is_site(self, node: Node) -> bool:
        """Attention that drops probabilities, or whose module keeps an unused dropout for it (set by the analysis)."""
        return self.own_rate(node) > 0 or "attention_dropout" in node.meta

    def own_rate(self, node: Node) -> float:
        """The ``dropout_p`` of the call."""
        return float(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))

    def _options(self, emit: Emitter, node: Node) -> tuple[Any, Any, Any, Any]:
        return (
            emit.argument(node, "attn_mask"), emit.argument(node, "is_causal", False),
            emit.argument(node, "scale"), emit.argument(node, "enable_gqa", False),
        )  # fmt: skip

    def _explicit(self, emit: Emitter, node: Node) -> tuple[Node, Any]:
        mask, is_causal, scale, gqa = self._options(emit, node)
        query, key = emit.value(node.args[0]), emit.value(node.args[1])
        probabilities = emit.call(attention_probabilities, query, key, emit.value(mask), is_causal, scale, gqa)
        rate, own = emit.rate(node), self.own_rate(node)
        if rate is None and own == 0:
            return probabilities, None
        layout = emit.layout(node) if rate is not None else None
        drop = own if rate is None else rate
        return probabilities, emit.call(
            attention_multiplier, probabilities, drop, layout, emit.draws, emit.site_name(node)
        )

    def base(self, emit: Emitter, node: Node) -> Any:
        if emit.rate(node) is None:
            return emit.copy(node)
        probabilities, factor = self._explicit(emit, node)
        return emit.call(attend, probabilities, emit.value(node.args[2]), factor, self._options(emit, node)[3])

    def respond(self, emit: Emitter, node: Node) -> Any:
        mask = self._mask_stack(emit, node)
        return emit.copy(node, **({} if mask is None else {"attn_mask": mask}))

    def _mask_stack(self, emit: Emitter, node: Node) -> Node | None:
        stack = emit.stack(emit.argument(node, "attn_mask"))
        return None if stack is None else emit.call(align, stack, emit.layout(node), emit.rank(node))

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        mask, _, scale, gqa = self._options(emit, node)
        tangents = [emit.tangent(argument) for argument in node.args[:3]]
        mask_tangent = self._mask_stack(emit, node)
        tangents.append(emit.tangent(mask) if mask_tangent is None else mask_tangent)
        if all(tangent is None for tangent in tangents):
            return self.base(emit, node), None
        probabilities, factor = self._explicit(emit, node)
        primals = [emit.value(argument) for argument in node.args[:3]]
        primal = emit.call(attend, probabilities, primals[2], factor, gqa)
        return primal, emit.call(attention_tangent, primals, tangents, probabilities, factor, scale, gqa)
