"""The interface of a rule, and the registry that rules are found in.

A rule covers one operator family.  It says along which axes a weight of the operator can respond, and emits the
operator's code for the three passes through an :class:`Emitter`.  It decides nothing about the model: what is
conditioned, and which hyperparameter acts where, is in the plan.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch.fx import Node

Layout = tuple[int, int, int]


@dataclass(frozen=True)
class Groups:
    """Groups of consecutive examples that share a perturbation of the hyperparameters.

    Attributes:
        size: of each.
        before: examples of the first group that are elsewhere (in another process).
    """

    size: int
    before: int = 0


@dataclass(frozen=True)
class StructuredChange:
    """Change of a weight in emitted code: row-wise (``factor`` = U) or low-rank (``factor`` = B, ``left`` = A).

    ``scales`` is the node of V delta, (B, O) or (B, r); ``row_axis`` the axis of the weight, as the operator sees it,
    that is scaled.
    """

    factor: Node
    scales: Node
    row_axis: int
    left: Node | None = None


class Emitter(Protocol):
    """What a rule may ask for while it emits the code of one node; nodes given are those of the captured graph."""

    def value(self, argument: Any) -> Any:
        """The argument in the new graph: the primal, or in the response pass the responded value."""

    def tangent(self, argument: Any) -> Node | None:
        """Tangent of an activation, packed like it; None = zero."""

    def stack(self, argument: Any) -> Node | None:
        """For a parameter that differs per example: its change (linearized) or value (response pass), (B, *unit)."""

    def structured(self, argument: Any) -> list[StructuredChange]:
        """For a weight with a structured response: the terms of its change; else empty."""

    def layout(self, node: Node) -> Layout:
        """Where the batch lies in this node's value."""

    def rank(self, argument: Any) -> int:
        """Number of axes of this node's value."""

    def call(self, target: Callable[..., Any], *arguments: Any, **options: Any) -> Node:
        """Emit one call."""

    def copy(self, node: Node, /, **replaced: Any) -> Node:
        """Emit the captured call itself, arguments by value; ``replaced`` by the schema's argument names."""

    def argument(self, node: Node, name: str, default: Any = None) -> Any:
        """An argument of the captured call by the schema's name."""

    def copy_with(self, node: Node, position: int, operand: Any, /, **replaced: Any) -> Node:
        """Emit the captured call with ``operand`` (of the new graph) as its argument at ``position``."""

    def argument_name(self, node: Node, position: int) -> str:
        """Name of the captured call's argument in the operator's schema."""

    def item(self, source: Node, index: int) -> Node:
        """Emit ``source[index]``."""

    def tangent_or_zeros(self, argument: Any) -> Node:
        """The tangent, or zeros like the value."""

    def floating(self, node: Node) -> bool:
        """Whether the value is floating (or a tuple, which may hold floating tensors)."""

    def static_size(self, node: Node, axis: int) -> int:
        """Size of an axis that does not depend on the batch."""

    def upper_bound(self, node: Node, part: str) -> int:
        """Upper bound of the hyperparameter that acts at this site, rounded up."""

    def rate(self, node: Node, part: str = "") -> Node | None:
        """Constrained values (B,) of the hyperparameter that acts at this site; None if none does."""

    def option(self, node: Node, name: str) -> Any:
        """What was chosen of the site's catalogue entry's own options; False where no hyperparameter acts here."""

    @property
    def updates_buffers(self) -> bool:
        """Whether the pass trains the model, so that running statistics follow it."""

    @property
    def groups(self) -> Groups | None:
        """Which examples share a perturbation, for norms that take statistics of the batch; None = not told."""

    def follows_statistics(self, node: Node) -> bool:
        """Whether derivatives of this norm, which reads running statistics, go through the statistics as well."""

    @property
    def draws(self) -> Node:
        """The source of random numbers."""

    def site_name(self, node: Node) -> str:
        """Qualified name of this site."""


class Rule:
    """Base class of all rules; the defaults fit an operator without weights that is linear in nothing.

    ``targets`` are the operators that the rule covers, ``name`` is what the report calls it.
    """

    name: str = "operator"
    targets: tuple[Any, ...] = ()
    per_example_arguments: tuple[str, ...] = ()
    """Schema names of the arguments that may be a stack, one value per example; others take the general way."""

    linear_in_first: bool = False
    """Whether the operator is linear in its first argument, and no other is differentiable."""

    single_term: bool = False
    """Whether the rule takes one structured change of a weight only, not a sum of several."""

    differentiable_primal: bool | None = None
    """Whether the primal that ``linearize`` gives is differentiable in what it is made of, so that it can train.

    None: those of stn_fx's own rules are; of others it is not known, and they do not train.
    """

    def covers(self, node: Node) -> bool:
        """Whether the rule holds for this call; other calls of its operators go the general way."""
        return True

    def weight_axes(self, node: Node, position: int, rank: int) -> tuple[int, ...]:
        """Axes of the tensor at ``position`` along which its response may be scaled, preferred first; () = none."""
        return ()

    def found_as(self, node: Node) -> tuple[str, str] | None:
        """(qualified name, catalogue entry) of the site that this call is, where the call itself says so.

        A rule that tells it has a method `own_values(node)` too: what the author gave to each component of the entry.
        """
        return None

    def is_table(self, node: Node, position: int) -> bool:
        """Whether the tensor at ``position`` is scaled along ``weight_axes`` only where it is large.

        Small ones get the exact Jacobian, as everything does that is no weight of a layer.
        """
        return False

    def padding_row(self, node: Node) -> int | None:
        """Index of the weight's axis 0 that no gradient reaches from this call; None = there is none."""
        return None

    def placed_values(self, node: Node) -> list[Node] | None:
        """Values whose batch layout must be decided for a parameter to respond here; None = result and all inputs."""
        return None

    def base(self, emit: Emitter, node: Node) -> Any:
        """Code of the base pass."""
        return emit.copy(node)

    def respond(self, emit: Emitter, node: Node) -> Any:
        """Code of the response pass; parameters that differ per example come as stacks."""
        return emit.copy(node)

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        """Code of the linearized pass: (primal, tangent), tangent None where it is zero."""
        raise NotImplementedError

    def without_batch(self, emit: Emitter, node: Node) -> tuple[Any, Any] | None:
        """Code for a value that depends on parameters only: (value, stack or None); None = the general way."""
        return None


class Registry:
    """Rules by operator.  A copy is given to every transformation, so a user's rule does not leak into others."""

    def __init__(self, rules: dict[Any, Rule] | None = None) -> None:
        self._rules: dict[Any, Rule] = dict(rules or {})

    def register(self, rule: type[Rule]) -> type[Rule]:
        """Class decorator: make this rule responsible for its ``targets``."""
        self.add(rule())
        return rule

    def add(self, rule: Rule) -> None:
        """Make ``rule`` responsible for its targets; one that was there before is replaced."""
        for target in rule.targets:
            self._rules[target] = rule

    def find(self, node: Node) -> Rule | None:
        """The rule for this node's operator, or None."""
        rule = self._rules.get(node.target) if node.op == "call_function" else None
        return rule if rule is not None and rule.covers(node) else None

    def rules(self) -> Iterable[Rule]:
        """Every rule once."""
        return list(dict.fromkeys(self._rules.values()))

    def targets(self) -> Iterable[Any]:
        """Every operator that has a rule."""
        return self._rules.keys()

    def copy(self) -> "Registry":
        """A registry of its own with the same rules."""
        return Registry(self._rules)


REGISTRY = Registry()
"""The built-in rules."""
