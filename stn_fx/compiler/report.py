"""The report: what was conditioned, by which rule, which hyperparameter acts where, what it costs, what was left out.

``Report.of`` collects it from the plan, and ``to_dict`` keeps every row; how it is printed is in ``report_tables``.
"""

import io
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from torch import nn
from torch.fx import Node

from stn_fx.compiler.cost import UpdateCost, predict_cost
from stn_fx.compiler.pipeline import CompiledModel
from stn_fx.compiler.plan import ParameterPlan, SitePlan
from stn_fx.hparams.weight_groups import weight_groups
from stn_fx.rules import Rule

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule

PRINTED_WIDTH = 118


@dataclass(frozen=True)
class HyperparameterRow:
    """One hyperparameter: bounds, start, current value, and the scale of its perturbation in raw space."""

    name: str
    low: float
    high: float | None
    """None = no upper bound."""
    discrete: bool
    initial: float
    value: float
    scale: float
    acts_at: tuple[str, ...]
    """Names of its sites; empty where it acts in the training loss."""


@dataclass(frozen=True)
class SiteRow:
    """One place that a hyperparameter acts on, or could."""

    name: str
    kind: str
    rule: str
    hyperparameters: tuple[str, ...]
    own_rate: float
    """The rate that the model's author gave."""
    inserted: bool
    batch_layout: str
    reason: str
    """Why no hyperparameter acts here; empty where one does."""


@dataclass(frozen=True)
class ParameterRow:
    """One parameter or effective weight: how it responds, or why it does not."""

    name: str
    shape: tuple[int, ...]
    scalars: int
    structure: str
    rule: str
    row_axis: int | None
    rank: int | None
    uses: int
    batch_layout: str
    response_scalars: int
    conditioned: bool
    effective_weight: bool
    through: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class MatchRow:
    """What one selection of the user matched: names of sites, of inputs, or of weights."""

    text: str
    matched: tuple[str, ...]


@dataclass(frozen=True)
class Totals:
    """Scalars of the model's parameters, and what the response adds to them."""

    scalars: int
    trainable: int
    conditioned: int
    response_scalars: int
    response_bytes: int
    model_bytes: int

    @property
    def conditioned_share(self) -> float:
        """Conditioned scalars of the trainable ones; parameters behind effective weights count through those."""
        return self.conditioned / self.trainable if self.trainable else 0.0


@dataclass(frozen=True)
class Report:
    """What the compiler did with one model."""

    model: str
    hyperparameters: tuple[HyperparameterRow, ...]
    matches: tuple[MatchRow, ...]
    """Selections with a pattern."""
    sites: tuple[SiteRow, ...]
    parameters: tuple[ParameterRow, ...]
    totals: Totals
    cost: UpdateCost | None
    cost_unknown_because: str
    notes: tuple[str, ...]

    @classmethod
    def of(cls, compiled: CompiledModel, stn: "SelfTuningModule") -> "Report":
        """Report of a compiled model with the wrapper's current hyperparameters."""
        cost, reason = _cost(compiled, stn)
        return cls(
            model=type(stn.model).__name__,
            hyperparameters=_hyperparameter_rows(compiled, stn),
            matches=_match_rows(compiled, stn),
            sites=_site_rows(compiled, stn),
            parameters=_parameter_rows(compiled),
            totals=_totals(compiled, stn),
            cost=cost,
            cost_unknown_because=reason,
            notes=compiled.plan.notes,
        )

    @property
    def conditioned_share(self) -> float:
        """Share of the trainable parameters' scalars that respond to the hyperparameters, 0 to 1."""
        return self.totals.conditioned_share

    @property
    def unconditioned(self) -> dict[str, str]:
        """Qualified names of the parameters that do not respond, with the reason."""
        return {row.name: row.reason for row in self.parameters if not row.conditioned}

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        cost = None
        if self.cost is not None:
            cost = asdict(self.cost) | {
                "ratio": self.cost.ratio,
                "default_ratio": self.cost.default_ratio,
                "matmul_ratio": self.cost.matmul_ratio,
            }
        return {
            "model": self.model,
            "hyperparameters": [_jsonable(row) for row in self.hyperparameters],
            "matches": [_jsonable(row) for row in self.matches],
            "sites": [_jsonable(row) for row in self.sites],
            "parameters": [_jsonable(row) for row in self.parameters],
            "totals": asdict(self.totals) | {"conditioned_share": self.conditioned_share},
            "cost": cost,
            "cost_unknown_because": self.cost_unknown_because,
            "unconditioned": self.unconditioned,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """The tables as plain text."""
        console = Console(file=io.StringIO(), width=PRINTED_WIDTH, color_system=None)
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]

    def __rich__(self) -> RenderableType:
        from stn_fx.compiler.report_tables import tables

        return tables(self)


def _cost(compiled: CompiledModel, stn: "SelfTuningModule") -> tuple[UpdateCost | None, str]:
    if not list(stn.response_parameters()):
        return None, "nothing responds, so an update is an ordinary one"
    if compiled.predicted_cost is None:  # counting takes a second or two: once for each compiled model
        try:
            compiled.predicted_cost = (predict_cost(compiled, stn), "")
        except Exception as error:  # an operator that cannot run on fake tensors must not cost the user the report
            first_line = str(error).splitlines()[0] if str(error) else "no message"
            compiled.predicted_cost = (None, f"{type(error).__name__}: {first_line}")
    return compiled.predicted_cost


def _hyperparameter_rows(compiled: CompiledModel, stn: "SelfTuningModule") -> tuple[HyperparameterRow, ...]:
    values = stn.hparams.values()
    scales = dict(zip(stn.hparams.names, stn.hparams.scales().tolist(), strict=True))
    sites: dict[str, list[str]] = {}
    for site in compiled.plan.sites:
        for _, name in site.hyperparameters:
            sites.setdefault(name, []).append(site.name)
    return tuple(
        HyperparameterRow(
            each.name, each.low, each.high if math.isfinite(each.high) else None, each.discrete, each.initial,
            values[each.name], scales[each.name], tuple(sites.get(each.name, ())),
        )
        for each in stn.hparams.resolved
    )  # fmt: skip


def _match_rows(compiled: CompiledModel, stn: "SelfTuningModule") -> tuple[MatchRow, ...]:
    weights = {name: p.ndim for name, p in stn.model.named_parameters() if p.requires_grad}
    rows = []
    for selection in stn.selections:
        if selection.pattern is None:
            continue
        entry = selection.entry
        if entry.pattern_over == "weights":
            names = [each.name for each in compiled.plan.hyperparameters if each.entry == entry.name]
            matched = weight_groups(names, weights)[selection.name_of(entry.components[0].name)]
        else:
            sites = [site for site in compiled.plan.sites if site.entry == entry.name and site.hyperparameters]
            matched = [site.name for site in sites if selection.matches(site.name)]
        rows.append(MatchRow(selection.text, tuple(dict.fromkeys(matched))))
    return tuple(rows)


def _site_rows(compiled: CompiledModel, stn: "SelfTuningModule") -> tuple[SiteRow, ...]:
    registry = compiled.registry
    nodes = {node.name: node for node in compiled.captured.training.graph.nodes}
    rules = {site.node: registry.find(nodes[site.node]) for site in compiled.plan.sites}
    return tuple(_site_row(site, rules[site.node]) for site in compiled.plan.sites)


def _site_row(site: SitePlan, rule: Rule | None) -> SiteRow:
    return SiteRow(
        name=site.name,
        kind=site.entry,
        rule=rule.name if rule is not None else "",
        hyperparameters=tuple(name for _, name in site.hyperparameters),
        own_rate=site.own_rate,
        inserted=site.inserted,
        batch_layout="undecided" if site.layout is None else str(site.layout),
        reason=site.reason,
    )


def _parameter_rows(compiled: CompiledModel) -> tuple[ParameterRow, ...]:
    layouts = _layouts_by_name(compiled)
    count = len(compiled.plan.hyperparameters)
    return tuple(_parameter_row(plan, count, layouts.get(plan.name, [])) for plan in compiled.plan.parameters)


def _parameter_row(plan: ParameterPlan, hyperparameters: int, layouts: list[str]) -> ParameterRow:
    structured = plan.structure in ("row-wise", "low-rank")
    return ParameterRow(
        name=plan.name,
        shape=plan.shape,
        scalars=plan.scalars,
        structure=plan.structure,
        rule=plan.rule,
        row_axis=plan.row_axis if structured else None,
        rank=plan.rank if plan.structure == "low-rank" else None,
        uses=plan.uses,
        batch_layout=", ".join(layouts),
        response_scalars=plan.response_scalars(hyperparameters),
        conditioned=plan.conditioned,
        effective_weight=plan.is_effective,
        through=plan.through,
        reason=plan.reason,
    )


def _layouts_by_name(compiled: CompiledModel) -> dict[str, list[str]]:
    """Parameter or effective weight -> where the batch lies in the outputs of the operators that use it."""
    found: dict[str, list[str]] = {}

    def note(name: str, consumer: Node, layouts: dict[Node, Any]) -> None:
        layout = str(layouts[consumer]) if consumer in layouts else ""
        if layout and layout not in found.setdefault(name, []):
            found[name].append(layout)

    for kind, analysed in compiled.analysed.items():
        uses, layouts = analysed.uses, analysed.layouts
        for name, weights in uses.weights.items():
            for use in weights:
                note(name, use.consumer, layouts)
        for name, general in uses.general.items():
            for consumer, _ in general:
                note(name, consumer, layouts)
        for node, weights in uses.effective.items():
            for use in weights:
                note(compiled.plan.effective.get(kind, {}).get(node.name, ""), use.consumer, layouts)
    return found


def _totals(compiled: CompiledModel, stn: "SelfTuningModule") -> Totals:
    own = [plan for plan in compiled.plan.parameters if not plan.is_effective]
    response = list(stn.response_parameters())
    return Totals(
        scalars=sum(plan.scalars for plan in own),
        trainable=sum(plan.scalars for plan in own if plan.structure != "frozen"),
        conditioned=sum(plan.scalars for plan in own if plan.conditioned),
        response_scalars=sum(parameter.numel() for parameter in response),
        response_bytes=_bytes(response),
        model_bytes=_bytes(stn.model.parameters()),
    )


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _jsonable(row: Any) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(row).items()}
