"""Embedding tables: scaled along their features, so that a table tied to a decoder has one response for both."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from stn_fx.rules.layout import scale_rows
from stn_fx.rules.rule import REGISTRY, Emitter, Rule
from stn_fx.rules.weighted import add_terms

aten = torch.ops.aten


def embed_low_rank(indices: Tensor, A: Tensor, B: Tensor, scales: Tensor, layout: Any, padding: int) -> Tensor:
    """Rows of ``B^T diag(s) A^T``: the table (N, D) is A (D, r) diag(s) B (r, N), transposed."""
    return scale_rows(torch.embedding(B.t(), indices, padding), scales, layout, -1) @ A.t()


@REGISTRY.register
class EmbeddingRule(Rule):
    """``embedding(W, indices, padding_idx)``, W (N, D)."""

    name = "embedding"
    targets = (aten.embedding.default,)

    def weight_axes(self, node: Node, position: int, rank: int) -> tuple[int, ...]:
        return (1,) if position == 0 else ()

    def padding_row(self, node: Node) -> int | None:
        row = node.args[2] if len(node.args) > 2 else node.kwargs.get("padding_idx", -1)
        return row if isinstance(row, int) and row >= 0 else None

    def _weight_term(self, emit: Emitter, node: Node) -> Node | None:
        indices, layout = emit.value(node.args[1]), emit.layout(node)
        padding = emit.argument(node, "padding_idx", -1)
        total = None
        for change in emit.structured(node.args[0]):
            if change.left is not None:
                left, factor = change.left, change.factor
                term = emit.call(embed_low_rank, indices, left, factor, change.scales, layout, padding)
            else:
                rows = emit.call(aten.embedding.default, change.factor, indices, padding)
                term = emit.call(scale_rows, rows, change.scales, layout, -1)
            total = add_terms(emit, total, term)
        return total

    def respond(self, emit: Emitter, node: Node) -> Any:
        return add_terms(emit, emit.copy(node), self._weight_term(emit, node))

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        return emit.copy(node), self._weight_term(emit, node)
