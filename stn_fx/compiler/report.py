"""The report: what was conditioned, by which rule, which hyperparameter acts where, what it costs, what was left out.

``Report.of`` collects it from the plan; ``to_dict`` keeps every row, and the printed tables put rows together whose
names differ in numbers only, so that a model of a hundred layers fits on a screen.
"""

import io
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console, Group, RenderableType
from rich.table import Table
from torch import nn
from torch.fx import Node

from stn_fx.compiler.cost import UpdateCost, predict_cost
from stn_fx.compiler.pipeline import CompiledModel
from stn_fx.compiler.plan import ParameterPlan, SitePlan

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule

PLAIN_LAYOUT = "axis 0"
GROUP_FROM = 3
"""Rows that differ in the numbers of their names only are printed as one from this many on."""

PRINTED_WIDTH = 118

Row = TypeVar("Row")


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
            sites=tuple(_site_row(site, compiled) for site in compiled.plan.sites),
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
            cost = asdict(self.cost) | {"ratio": self.cost.ratio, "matmul_ratio": self.cost.matmul_ratio}
        return {
            "model": self.model,
            "hyperparameters": [_jsonable(row) for row in self.hyperparameters],
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
        parts: list[RenderableType] = [_hyperparameter_table(self.hyperparameters), "", _site_table(self.sites), ""]
        parts += [_parameter_table([row for row in self.parameters if row.conditioned]), ""]
        left_out = [row for row in self.parameters if not row.conditioned]
        parts += [_left_out_table(left_out), ""] if left_out else ["Every parameter is conditioned.", ""]
        return Group(*parts, *self._summary())

    def _summary(self) -> list[str]:
        totals = self.totals
        lines = [
            f"Conditioned: {totals.conditioned:,} of {totals.trainable:,} trainable scalars "
            f"({100 * self.conditioned_share:.1f} %)",
            f"Response: {totals.response_scalars:,} parameters, {_size(totals.response_bytes)} "
            f"(the model has {totals.scalars:,}, {_size(totals.model_bytes)}); as much again for their gradients",
        ]
        if self.cost is None:
            lines.append(f"Cost of a training update: not predicted ({self.cost_unknown_because})")
        else:
            lines.append(
                f"Cost of a training update: about {self.cost.ratio:.2f} times an ordinary one at batch size "
                f"{self.cost.batch_size} ({self.cost.matmul_ratio:.2f} times where matrix products take all the time)"
            )
        return lines + [f"Note: {note}" for note in self.notes]


def _cost(compiled: CompiledModel, stn: "SelfTuningModule") -> tuple[UpdateCost | None, str]:
    try:
        return predict_cost(compiled, stn), ""
    except Exception as error:  # an operator that cannot run on fake tensors must not cost the user the report
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


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


def _site_row(site: SitePlan, compiled: CompiledModel) -> SiteRow:
    return SiteRow(
        site.name, site.entry, site.entry.replace("_", " "), tuple(name for _, name in site.hyperparameters),
        site.own_rate, site.inserted, "undecided" if site.layout is None else str(site.layout), site.reason,
    )  # fmt: skip


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


# ---- printing


def _table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _hyperparameter_table(rows: tuple[HyperparameterRow, ...]) -> Table:
    numbers = ("from", "to", "initial", "now", "scale")
    table = _table("Hyperparameters", "name", *numbers, "acts at", right=numbers)
    for names, group in _grouped(rows, lambda r: r.name, lambda r: (r.low, r.high, r.discrete, bool(r.acts_at))):
        first = group[0]
        places = sorted({place for row in group for place in row.acts_at})
        table.add_row(
            names,
            f"{first.low:g}",
            "-" if first.high is None else f"{first.high:g}" + ", whole" * first.discrete,
            _range(row.initial for row in group),
            _range(row.value for row in group),
            _range(row.scale for row in group),
            f"{len(places)} sites" if len(places) > 1 else places[0] if places else "the training loss",
        )
    return table


def _site_table(rows: tuple[SiteRow, ...]) -> Table:
    table = _table("Sites", "site", "kind", "hyperparameter", "own rate", "batch", "remark", right=("own rate",))

    def alike(row: SiteRow) -> Any:
        return row.kind, row.inserted, row.batch_layout, row.reason, len(row.hyperparameters)

    for names, group in _grouped(rows, lambda r: r.name, alike):
        first = group[0]
        acting = list(dict.fromkeys(name for row in group for name in row.hyperparameters))
        shown = ", ".join(_patterns(acting)) or "-"
        table.add_row(
            names,
            first.rule,
            shown,
            "-" if first.inserted else _range(row.own_rate for row in group),
            first.batch_layout,
            ", ".join(filter(None, ["inserted" * first.inserted, first.reason])),
        )
    if not rows:
        table.add_row("none", "", "", "", "", "")
    return table


def _parameter_table(rows: list[ParameterRow]) -> Table:
    table = _table(
        "Conditioned parameters", "parameter", "scalars", "response", "adds", "by rule", "remark",
        right=("scalars", "adds"),
    )  # fmt: skip

    def alike(row: ParameterRow) -> Any:
        return row.structure, row.rule, row.row_axis, row.rank, _remark(row)

    for names, group in _grouped(rows, lambda r: r.name, alike):
        first = group[0]
        table.add_row(
            names,
            f"{sum(row.scalars for row in group):,}",
            first.structure + (f" {first.rank}" if first.rank else ""),
            f"{sum(row.response_scalars for row in group):,}",
            first.rule,
            _remark(first),
        )
    return table


def _left_out_table(rows: list[ParameterRow]) -> Table:
    table = _table("Not conditioned", "parameter", "scalars", "why", right=("scalars",))
    for names, group in _grouped(rows, lambda r: r.name, lambda r: r.reason):
        table.add_row(names, f"{sum(row.scalars for row in group):,}", group[0].reason)
    return table


def _remark(row: ParameterRow) -> str:
    remarks = [row.reason]
    if row.effective_weight:
        remarks.append("effective weight")
    if row.row_axis:
        remarks.append(f"rows on axis {row.row_axis}")
    if row.uses > 1:
        remarks.append(f"used {row.uses} times")
    if row.batch_layout not in ("", PLAIN_LAYOUT):
        remarks.append(f"batch: {row.batch_layout}")
    return "; ".join(filter(None, remarks))


def _grouped(
    rows: Iterable[Row], name: Callable[[Row], str], alike: Callable[[Row], Any]
) -> list[tuple[str, list[Row]]]:
    """Rows that are alike and whose names differ in numbers only, under a common pattern; few stay single."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((_pattern(name(row)), alike(row)), []).append(row)
    shown: list[tuple[str, list[Row]]] = []
    for (pattern, _), group in groups.items():
        if len(group) >= GROUP_FROM:
            shown.append((f"{pattern} ({len(group)})", group))
        else:
            shown += [(name(row), [row]) for row in group]
    return shown


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _patterns(names: list[str]) -> list[str]:
    return [shown for shown, _ in _grouped(names, lambda name: name, lambda _: None)]


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    low, high = f"{found[0]:.4g}", f"{found[-1]:.4g}"
    return low if low == high else f"{low} to {high}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
