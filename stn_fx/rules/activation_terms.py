"""Terms of the loss on activations: activation regularization and its temporal form (Merity et al. 2017).

A site stands beside the way of the data, as a tap: it hands out the activation, examples first, behind the outputs of
the pass, and in the linearized pass its tangent too. The updates make the term of it, with an own coefficient for each
example.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import Node

from stn_fx.rules.layout import unpack
from stn_fx.rules.markers import marks
from stn_fx.rules.rule import REGISTRY, Emitter, Rule


@marks("activation_regularization", "temporal_activation_regularization")
def activation_tap(x: Tensor) -> Tensor:
    """Marks an activation that a term of the loss looks at."""
    return x


def examples_first(x: Tensor, layout: tuple[int, int, int]) -> Tensor:
    """The activation as (B, *axes of one example); what is folded with the batch is the first of these."""
    axis, outer, inner = layout
    stack = unpack(x, layout)
    return stack.squeeze(axis + 1) if outer * inner == 1 else stack.movedim(axis + 1, 1)


def mean_square(x: Tensor) -> Tensor:
    """Mean square (B,) of what each example has in ``x`` (B, ...)."""
    return x.flatten(1).square().mean(1)


def mean_square_change(x_BTF: Tensor) -> Tensor:
    """Mean square (B,) of the differences between successive time steps; zero where there is one step only."""
    change = x_BTF.diff(dim=1).flatten(1)
    return change.square().sum(1) / max(change.shape[1], 1)


TERMS: dict[str, Callable[[Tensor], Tensor]] = {
    "activation_regularization": mean_square,
    "temporal_activation_regularization": mean_square_change,
}
"""Catalogue entry -> its term (B,) of an activation with the examples first."""


@REGISTRY.register
class ActivationTapRule(Rule):
    """Hands out an activation; nothing uses the node but the end of the graph."""

    name = "activation term"
    targets = (activation_tap,)

    def is_site(self, node: Node) -> bool:
        """Inserted by the plan, so always a site."""
        return True

    def own_rate(self, node: Node) -> float:
        """There is no rate of the author's."""
        return 0.0

    def base(self, emit: Emitter, node: Node) -> Any:
        return emit.call(examples_first, emit.value(node.args[0]), emit.layout(node))

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        tangent = emit.tangent(node.args[0])
        moved = None if tangent is None else emit.call(examples_first, tangent, emit.layout(node))
        return self.base(emit, node), moved
