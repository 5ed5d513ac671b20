"""Live progress of a run in the terminal: a bar, the losses, and the hyperparameters moving."""

from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from stn_fx.bilevel.algorithm import InnerRecord
from stn_fx.bilevel.callbacks import Callback
from stn_fx.bilevel.records import EpochRecord, FitResult

if TYPE_CHECKING:
    from stn_fx.bilevel.trainer import BilevelTrainer

MAX_ROWS = 16
SMOOTHING = 0.9


class LiveProgress(Callback):
    """Shows a run while it goes on; on a terminal that cannot be redrawn, one line per epoch.

    Args:
        console: of rich; standard output where None.
        title: stands before the bar and every line.
    """

    first_process_only = True

    def __init__(self, console: Console | None = None, title: str = "tuning") -> None:
        self.console = console or Console()
        self.title = title
        self.progress = Progress(
            TextColumn(f"[bold]{title}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"), TimeRemainingColumn()
        )
        self.live = Live(console=self.console, refresh_per_second=4, auto_refresh=False)
        self.loss: float | None = None

    def fit_started(self, trainer: "BilevelTrainer", epochs: int, result: FitResult) -> None:
        self.task = self.progress.add_task("", total=epochs, completed=len(result.history))
        self.epochs = epochs
        if self.console.is_terminal:
            self.live.start()
        self._show(result)

    def inner_step_ended(self, trainer: "BilevelTrainer", epoch: int, record: InnerRecord) -> None:
        self.loss = record.loss if self.loss is None else SMOOTHING * self.loss + (1 - SMOOTHING) * record.loss

    def outer_step_ended(self, trainer: "BilevelTrainer", epoch: int, result: FitResult) -> None:
        self._show(result)

    def epoch_ended(self, trainer: "BilevelTrainer", record: EpochRecord, result: FitResult) -> None:
        self.progress.advance(self.task)
        self._show(result)
        if not self.console.is_terminal:
            self.console.print(epoch_line(self.title, record, self.epochs, result), soft_wrap=True)

    def fit_ended(self, trainer: "BilevelTrainer", result: FitResult) -> None:
        if self.console.is_terminal:
            self._show(result)
            self.live.stop()

    def _show(self, result: FitResult) -> None:
        if self.console.is_terminal:
            self.live.update(Group(self.progress, self._losses(result), hyperparameter_table(result)), refresh=True)

    def _losses(self, result: FitResult) -> str:
        inner = "-" if self.loss is None else f"{self.loss:.4f}"
        valid = f"{result.history[-1].valid_loss:.4f}" if result.history else "-"
        best = f"{result.best.valid_loss:.4f} (epoch {result.best.epoch})" if result.best else "-"
        skipped = f"   not finite, skipped: {result.skipped}" if result.skipped else ""
        return f"inner loss {inner}   validation loss {valid}   best {best}{skipped}"


def epoch_line(title: str, record: EpochRecord, epochs: int, result: FitResult) -> str:
    """One line for a log: epoch, losses, hyperparameters."""
    values = " ".join(f"{name}={value:.3g}" for name, value in list(result.values.items())[:MAX_ROWS])
    moving = f"  {values}" if result.history[-1].response_loss is not None else ""
    skipped = f"  not finite, skipped: {record.skipped}" if record.skipped else ""
    return (
        f"{title}  epoch {record.epoch}/{epochs}  inner loss {record.train_loss:.4f}  "
        f"validation loss {record.valid_loss:.4f}{skipped}{moving}"
    )


def hyperparameter_table(result: FitResult) -> Table:
    """Initial and current values with the scale of the perturbation; the last rows of many are summed up."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("hyperparameter")
    for column in ("start", "now", "scale"):
        table.add_column(column, justify="right")
    first, last = result.schedule[0], result.schedule[-1]
    names = list(last.values)
    for name in names[:MAX_ROWS]:
        table.add_row(name, f"{first.values[name]:.4g}", f"{last.values[name]:.4g}", f"{last.scales[name]:.3f}")
    if len(names) > MAX_ROWS:
        table.add_row(f"and {len(names) - MAX_ROWS} more, in the run folder", "", "", "")
    return table
