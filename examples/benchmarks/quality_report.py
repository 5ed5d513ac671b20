"""Tables and pictures of what `quality.py run` left.

`summary.csv`: a row for each task, method, start and budget.  `curves.csv`: best validation loss so far against compute
of every run.  `trajectories.csv`: hyperparameters after every epoch of the tuned runs.
"""

import csv
import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from quality_methods import COMPARED, METHODS, SEARCHES, START_UP_TRIALS, TRIALS, TUNING_BUDGET
from quality_tuners import FROM_ALL_STARTS
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

mpl.use("Agg")
import matplotlib.pyplot as plt

BUDGETS = (1, START_UP_TRIALS, TRIALS)
ORDERS = 1000
"""Random orders of the pool that random search is resampled with."""
POINTS = 60
TOLERANCE = 1e-6
"""In plain runs, for sums of epochs."""


@dataclass(frozen=True)
class Chain:
    """What one method found with one seed: runs one after the other.

    Attributes:
        task: name.
        method: name.
        start: name of the starting point, or empty.
        seed: of the chain; the number of the order for random search.
        runs: in the order of their compute.
    """

    task: str
    method: str
    start: str
    seed: int
    runs: list[dict[str, Any]]

    def chosen(self, budget: float) -> dict[str, Any] | None:
        """The run with the lowest validation loss among those that ended within the budget (plain runs)."""
        spent, found = 0.0, []
        for run in self.runs:
            spent += run["curve"][-1][0]
            if spent <= budget + TOLERANCE:
                found.append(run)
        return min(found, key=lambda run: run["valid_loss"], default=None)

    def curve(self) -> list[tuple[float, float]]:
        """(Compute in plain runs, lowest validation loss so far)."""
        points, spent, best = [], 0.0, math.inf
        for run in self.runs:
            for compute, loss in run["curve"]:
                best = min(best, loss)
                points.append((spent + compute, best))
            spent += run["curve"][-1][0]
        return points

    @property
    def compute(self) -> float:
        """Plain runs that all runs are worth."""
        return sum(run["curve"][-1][0] for run in self.runs)


def read_chains(out: Path, tasks: Iterable[str]) -> list[Chain]:
    """Everything that is finished, searches only as far as their trials go."""
    chains = []
    for task in tasks:
        for method in METHODS:
            for folder in sorted(out.glob(f"{task}/{method}*")):
                name, _, start = folder.name.partition("-")
                seeds = sorted(folder.glob("seed*"), key=lambda seed: int(seed.name.removeprefix("seed")))
                if name != method:
                    continue
                found = [[json.loads(path.read_text()) for path in sorted(seed.glob("*.json"))] for seed in seeds]
                if method == "random":
                    pool = [runs[0] for runs in found if runs]
                    chains += [Chain(task, method, "", order, runs) for order, runs in enumerate(_orders(pool))]
                else:
                    numbered = zip(seeds, found, strict=True)
                    chains += [Chain(task, method, start, int(s.name[4:]), runs) for s, runs in numbered if runs]
    return chains


def _orders(pool: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    if len(pool) < TRIALS:
        return []
    chooser = random.Random(0)
    return [chooser.sample(pool, TRIALS) for _ in range(ORDERS)]


def summarize(chains: list[Chain]) -> list[dict[str, Any]]:
    """Means and standard errors over the seeds; of random search the standard deviation over the resampled orders."""
    groups: dict[tuple[str, str, str], list[Chain]] = defaultdict(list)
    for chain in chains:
        groups[chain.task, chain.method, chain.start].append(chain)
    rows = []
    for (task, method, start), members in groups.items():
        for budget in BUDGETS if method in SEARCHES else (TUNING_BUDGET,):
            spent = [each for each in members if method not in SEARCHES or each.compute >= budget - TOLERANCE]
            chosen = [run for chain in spent if (run := chain.chosen(budget)) is not None]
            if not chosen:
                continue
            row: dict[str, Any] = {"task": task, "method": method, "start": start, "plain_runs": budget}
            row["seeds"] = len(chosen) if method != "random" else f"{ORDERS} orders"
            for key in ("valid_loss", "test_loss", "test_accuracy"):
                values = [run[key] for run in chosen]
                spread = statistics.stdev(values) if len(values) > 1 else math.nan
                row[key] = statistics.mean(values)
                row[f"{key}_error"] = spread if method == "random" else spread / math.sqrt(len(values))
            rows.append(row)
    return rows


def write_report(out: Path, tasks: list[str], console: Console) -> None:
    """Write the three tables and two pictures, and print the summary."""
    chains = read_chains(out, tasks)
    if not chains:
        console.print(f"Nothing is finished in {out}.")
        return
    rows = summarize(chains)
    _write(out / "summary.csv", rows)
    _write(out / "curves.csv", _curve_rows(chains))
    tuned = [chain for chain in chains if chain.runs[0]["scales"]]
    _write(out / "trajectories.csv", _trajectory_rows(tuned))
    _draw_curves(out / "curves.png", chains)
    for task in dict.fromkeys(chain.task for chain in tuned):
        mine = [chain for chain in tuned if chain.task == task and chain.method == "delta_stn"]
        if mine:
            _draw_trajectories(out / f"trajectories-{task}.png", mine)
    _print(rows, console)


def _curve_rows(chains: list[Chain]) -> list[dict[str, Any]]:
    return [
        {"task": c.task, "method": c.method, "start": c.start, "seed": c.seed, "plain_runs": x, "best_valid_loss": y}
        for c in chains
        if c.method != "random"
        for x, y in c.curve()
    ]


def _trajectory_rows(chains: list[Chain]) -> list[dict[str, Any]]:
    rows = []
    for c in chains:
        (run,) = c.runs
        where = {"task": c.task, "method": c.method, "start": c.start, "seed": c.seed}
        for epoch, (values, scales) in enumerate(zip(run["trajectory"], run["scales"], strict=True), start=1):
            for name, value in values.items():
                rows.append({**where, "epoch": epoch, "hyperparameter": name, "value": value, "scale": scales[name]})
    return rows


def _mean_curve(chains: list[Chain]) -> tuple[list[float], list[float], list[float]]:
    """Mean and spread (standard error over the seeds, deviation over resampled orders) on a common grid."""
    end = min(chain.compute for chain in chains)
    curves = [chain.curve() for chain in chains]
    first = max(curve[0][0] for curve in curves)
    grid = [first + (end - first) * i / (POINTS - 1) for i in range(POINTS)]
    at = [[_reached(curve, x) for curve in curves] for x in grid]
    spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in at]
    if chains[0].method != "random":
        spreads = [spread / math.sqrt(len(chains)) for spread in spreads]
    return grid, [statistics.mean(values) for values in at], spreads


def _reached(curve: list[tuple[float, float]], compute: float) -> float:
    return [loss for x, loss in curve if x <= compute + TOLERANCE][-1]


def _draw_curves(path: Path, chains: list[Chain]) -> None:
    """What is compared, and the variants that begin at every start; the others are in the tables."""
    drawn = {*COMPARED, *FROM_ALL_STARTS}
    chains = [chain for chain in chains if chain.method in drawn] or chains
    tasks = list(dict.fromkeys(chain.task for chain in chains))
    figure, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 4.2), squeeze=False, layout="constrained")
    for ax, task in zip(axes[0], tasks, strict=True):
        groups: dict[str, list[Chain]] = defaultdict(list)
        for chain in chains:
            if chain.task == task:
                groups[f"{chain.method} {chain.start}".replace("_", "-").strip()].append(chain)
        for label, members in groups.items():
            longest = max(chain.compute for chain in members)
            x, mean, spread = _mean_curve(
                [each for each in members if each.compute > 0.99 * longest]
            )  # not those under way
            (line,) = ax.plot(x, mean, label=label, lw=2 if label.startswith("delta") else 1)
            low, high = ([m + s * e for m, e in zip(mean, spread, strict=True)] for s in (-1, 1))
            ax.fill_between(x, low, high, alpha=0.15, color=line.get_color(), lw=0)
        ax.set(title=task, xlabel="compute (plain runs)", ylabel="best validation loss", xscale="log")
        lowest = min(min(loss for _, loss in chain.curve()) for chain in chains if chain.task == task)
        ax.set_ylim(0.97 * lowest, 1.5 * lowest)
        ax.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_trajectories(path: Path, chains: list[Chain]) -> None:
    names = list(chains[0].runs[0]["trajectory"][0])
    starts = list(dict.fromkeys(chain.start for chain in chains))
    rows = math.ceil(len(names) / 3)
    figure, axes = plt.subplots(rows, 3, figsize=(11, 2.4 * rows), squeeze=False, layout="constrained")
    for ax in axes.flat[len(names) :]:
        ax.axis("off")
    for ax, name in zip(axes.flat, names, strict=False):
        for chain in chains:
            run = chain.runs[0]
            values = [run["initial"][name], *(each[name] for each in run["trajectory"])]
            number = starts.index(chain.start)
            label = chain.start if chain.seed == min(c.seed for c in chains if c.start == chain.start) else None
            ax.plot(range(len(values)), values, color=f"C{number}", alpha=0.7, lw=1, label=label)
        ax.set(title=name, xlabel="epoch")
    axes.flat[0].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _print(rows: list[dict[str, Any]], console: Console) -> None:
    title = "means and standard errors over the seeds"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("task", "method", "start", "plain runs", "seeds", "valid loss", "test loss", "test accuracy"):
        table.add_column(column, justify="left" if column in ("task", "method", "start") else "right")
    for row in rows:
        cells = [_with_error(row[key], row[f"{key}_error"]) for key in ("valid_loss", "test_loss", "test_accuracy")]
        table.add_row(row["task"], row["method"], row["start"], f"{row['plain_runs']:g}", str(row["seeds"]), *cells)
    console.print(table)


def _with_error(value: float, error: float) -> str:
    return f"{value:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    if rows:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
