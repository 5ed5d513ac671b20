"""The tables that a finished run ends with."""

from collections.abc import Mapping

from rich.table import Table

from stn_fx.bilevel.comparison import Run


def comparison_table(tuned: Run, fixed: Run | None, epochs: int) -> Table:
    """Loss and accuracy of the tuned run, next to the run at the initial values where there is one."""
    runs = {"tuned": tuned} | ({"fixed": fixed} if fixed is not None else {})
    caption = "fixed: the same model, hyperparameters at their start values" if fixed is not None else None
    return _table(runs, epochs, caption)


def replay_table(runs: Mapping[str, Run], epochs: int) -> Table:
    """Loss and accuracy of plain training along a schedule, by the way that it was followed."""
    return _table(runs, epochs, "trained from scratch by the base pass alone, nothing tuned")


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
