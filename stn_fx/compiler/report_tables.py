"""How a report is printed: rows whose names differ in numbers only are one row, so that big models fit on a screen."""

import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from rich.console import Group, RenderableType
from rich.table import Table

from stn_fx.compiler.report import HyperparameterRow, ParameterRow, Report, SiteRow

PLAIN_LAYOUT = "axis 0"
GROUP_FROM = 3
"""Rows that differ in the numbers of their names only are printed as one from this many on."""

Row = TypeVar("Row")


def tables(report: Report) -> RenderableType:
    """Hyperparameters, sites, parameters, what was left out, and the sums."""
    parts: list[RenderableType] = [_hyperparameter_table(report.hyperparameters), "", _site_table(report.sites), ""]
    parts += [_parameter_table([row for row in report.parameters if row.conditioned]), ""]
    left_out = [row for row in report.parameters if not row.conditioned]
    parts += [_left_out_table(left_out), ""] if left_out else ["Every parameter is conditioned.", ""]
    return Group(*parts, *_summary(report))


def _summary(report: Report) -> list[str]:
    totals = report.totals
    lines = [
        f"Conditioned: {totals.conditioned:,} of {totals.trainable:,} trainable scalars "
        f"({100 * report.conditioned_share:.1f} %)",
        f"Response: {totals.response_scalars:,} parameters, {_size(totals.response_bytes)} "
        f"(the model has {totals.scalars:,}, {_size(totals.model_bytes)}); as much again for their gradients",
    ]
    if report.cost is None:
        lines.append(f"Cost of a training update: not predicted ({report.cost_unknown_because})")
    else:
        lines.append(
            f"Cost of a training update: about {report.cost.default_ratio:.2f} times an ordinary one at batch size "
            f"{report.cost.batch_size}, {report.cost.ratio:.2f} where the response learns from every whole batch (then "
            f"{report.cost.matmul_ratio:.2f} if matrix products take all the time)"
        )
    lines += [f"{row.text} matched {', '.join(row.matched) or 'nothing that another left'}" for row in report.matches]
    return lines + [f"Note: {note}" for note in report.notes]


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
            first.kind.replace("_", " "),
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
