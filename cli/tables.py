"""The tables that a finished run ends with."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from stn_fx.bilevel.atomic import write_atomically
from stn_fx.bilevel.comparison import Run
from stn_fx.bilevel.records import FitResult
from stn_fx.bilevel.verdict import verdicts

MAX_VERDICTS = 6


def comparison_table(runs: Mapping[str, Run], epochs: int) -> Table:
    """Loss and accuracy of the tuned run, next to the run at the initial values where there is one."""
    caption = "fixed: the same model, hyperparameters at their start values" if "fixed" in runs else None
    return _table(runs, epochs, caption)


def replay_table(runs: Mapping[str, Run], epochs: int) -> Table:
    """Loss and accuracy of plain training along a schedule, by the way that it was followed."""
    return _table(runs, epochs, "trained from scratch by the base pass alone, nothing tuned")


def verdict_lines(result: FitResult) -> list[str]:
    """What the run says against its own values: a line for each, or how many there are where they are many."""
    found = verdicts(result)
    doubtful = [each for each in found if not each.trusted]
    if not found:
        return []
    head = f"Trusted: {len(found) - len(doubtful)} of {len(found)} hyperparameters."
    if len(doubtful) > MAX_VERDICTS:
        return [f"{head} `stn-fx report` tells what speaks against the others."]
    return [head, *(f"  {each.name}: {each.words}" for each in doubtful)]


def write_comparison(path: Path, runs: Mapping[str, Run]) -> None:
    """What the tables show, as CSV: one row for each run, at its epoch with the lowest validation loss."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "valid_loss", "valid_accuracy", "test_loss", "test_accuracy", "epoch", "seconds"])
    for name, run in runs.items():
        best, losses = run.result.best, (run.valid.loss, run.valid.accuracy, run.test.loss, run.test.accuracy)
        writer.writerow([name, *losses, best.epoch if best else None, round(run.seconds, 3)])
    write_atomically(path, lambda temporary: temporary.write_text(text.getvalue()))


def _table(runs: Mapping[str, Run], epochs: int, caption: str | None) -> Table:
    table = Table(
        title=f"At the epoch with the lowest validation loss, of {epochs}",
        caption=caption,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for column in ("valid. loss", "accuracy", "test loss", "accuracy", "epoch", "seconds"):
        table.add_column(column, justify="right")
    for name, run in runs.items():
        best = run.result.best
        table.add_row(
            name,
            f"{run.valid.loss:.4f}",
            _percent(run.valid.accuracy),
            f"{run.test.loss:.4f}",
            _percent(run.test.accuracy),
            str(best.epoch) if best else "-",
            f"{run.seconds:.0f}",
        )
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
