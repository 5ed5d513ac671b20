"""The plan: what is conditioned, by which rule, which hyperparameter acts where, and the reason where not.

Pure: it reads captured graphs and yields frozen records.  The report, the dry run, the errors and the rewrite all work
from them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from stn_fx.hparams import ResolvedHyperparameter
from stn_fx.rules.layout import BatchLayout


@dataclass(frozen=True)
class ParameterPlan:
    """How one parameter (or one effective weight) responds.

    ``structure`` is "row-wise", "low-rank", "exact", "effective" (conditioned through the effective weights named in
    ``through``), "frozen" or "none"; ``reason`` says why it is not conditioned, or what is particular.
    ``padding_row`` is the entry of an embedding table that no gradient reaches, so that its response stays zero.
    """

    name: str
    shape: tuple[int, ...]
    structure: str
    rule: str = ""
    row_axis: int = 0
    rank: int = 0
    terms: int = 1
    uses: int = 0
    reason: str = ""
    through: tuple[str, ...] = ()
    is_effective: bool = False
    padding_row: int | None = None

    @property
    def scalars(self) -> int:
        """Number of scalars."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def conditioned(self) -> bool:
        """Whether the parameter's value differs per example."""
        return self.structure in ("row-wise", "low-rank", "exact", "effective")

    def without_response(self) -> "ParameterPlan":
        """The same parameter where nothing shall respond."""
        if not self.conditioned:
            return self
        return replace(self, structure="none", rule="", through=(), reason="no response was asked for")

    def with_terms_for(self, hyperparameters: int) -> "ParameterPlan":
        """The same parameter with as many terms as hyperparameters at most."""
        terms = min(self.terms, max(1, hyperparameters))
        notes = ([f"{terms} terms"] if terms > 1 else []) + ([self.reason] if self.reason else [])
        return replace(self, terms=terms, reason=", ".join(notes))

    def response_scalars(self, hyperparameters: int) -> int:
        """Number of response parameters that the structure adds."""
        rows = self.shape[self.row_axis] if self.shape else 1
        if self.structure == "row-wise":
            return self.terms * (self.scalars + rows * hyperparameters)
        if self.structure == "low-rank":
            return rows * self.rank + self.rank * (self.scalars // rows) + self.rank * hyperparameters
        return self.scalars * hyperparameters if self.structure == "exact" else 0


@dataclass(frozen=True)
class SitePlan:
    """A place in the training graph that a hyperparameter acts on, or could."""

    name: str
    entry: str
    node: str
    own_rate: float = 0.0
    inserted: bool = False
    layout: BatchLayout | None = None
    hyperparameters: tuple[tuple[str, str], ...] = ()
    """(component, full name) of the hyperparameters that act here; empty where none does."""
    reason: str = ""
    options: dict[str, bool | int] = field(default_factory=dict)
    """What was chosen of the catalogue entry's own options, such as ``locked`` for dropout."""


@dataclass(frozen=True)
class Plan:
    """Everything that the rewrite and the report need to know."""

    parameters: tuple[ParameterPlan, ...]
    sites: tuple[SitePlan, ...]
    hyperparameters: tuple[ResolvedHyperparameter, ...]
    effective: dict[str, dict[str, str]] = field(default_factory=dict)
    """Graph ("training", "evaluation") -> node name -> name of the effective weight that the node holds."""
    notes: tuple[str, ...] = ()

    def parameter(self, name: str) -> ParameterPlan:
        """The plan of one parameter by its qualified name."""
        return next(each for each in self.parameters if each.name == name)

    def with_notes(self, notes: Iterable[str]) -> "Plan":
        """The same plan with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def column(self, name: str) -> int:
        """Index of a hyperparameter."""
        return [each.name for each in self.hyperparameters].index(name)
