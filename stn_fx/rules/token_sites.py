"""Word dropout and span masking at token inputs: integers with one axis of time beside the batch, or more."""

from typing import Any

from torch import Tensor
from torch.fx import Node

from stn_fx.augment.draws import Draws
from stn_fx.augment.tokens import mask_spans, mask_words
from stn_fx.rules.input_sites import InputRule
from stn_fx.rules.layout import pack, unpack
from stn_fx.rules.markers import marks
from stn_fx.rules.rule import REGISTRY, Emitter


@marks("word_dropout")
def word_dropout_site(tokens: Tensor) -> Tensor:
    """Marks tokens that are dropped one by one."""
    return tokens


@marks("span_masking")
def span_masking_site(tokens: Tensor) -> Tensor:
    """Marks tokens that are dropped in spans."""
    return tokens


def apply_word_dropout(
    tokens: Tensor, rate: Tensor, layout: Any, draws: Draws, name: str, mask_token: int, padding: int
) -> Tensor:
    """Word dropout with one rate per example, (B,)."""
    stack = unpack(tokens, layout)
    masked = mask_words(stack.flatten(1), rate, draws, name, mask_token, padding)
    return pack(masked.reshape(stack.shape), layout)


def apply_span_masking(
    tokens: Tensor, rate: Tensor, length: Tensor, most: int, layout: Any, draws: Draws, name: str, mask_token: int,
    padding: int,
) -> Tensor:  # fmt: skip
    """Span masking with rate and length per example, both (B,)."""
    stack = unpack(tokens, layout)
    masked = mask_spans(stack.flatten(1), rate, length, most, draws, name, mask_token, padding)
    return pack(masked.reshape(stack.shape), layout)


@REGISTRY.register
class WordDropoutRule(InputRule):
    """Tokens replaced one by one."""

    name = "word dropout"
    targets = (word_dropout_site,)

    def base(self, emit: Emitter, node: Node) -> Any:
        tokens, rate, chosen = emit.value(node.args[0]), emit.rate(node), _chosen(emit, node)
        return emit.call(apply_word_dropout, tokens, rate, emit.layout(node), emit.draws, emit.site_name(node), *chosen)


@REGISTRY.register
class SpanMaskingRule(InputRule):
    """Tokens replaced in spans."""

    name = "span masking"
    targets = (span_masking_site,)

    def base(self, emit: Emitter, node: Node) -> Any:
        tokens, rate, length = emit.value(node.args[0]), emit.rate(node, "rate"), emit.rate(node, "length")
        most, layout, name = emit.upper_bound(node, "length"), emit.layout(node), emit.site_name(node)
        return emit.call(apply_span_masking, tokens, rate, length, most, layout, emit.draws, name, *_chosen(emit, node))


def _chosen(emit: Emitter, node: Node) -> tuple[int, int]:
    return emit.option(node, "mask_token"), emit.option(node, "padding")
