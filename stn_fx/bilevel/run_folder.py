"""The folder that a run leaves behind, written while it runs, so that an interrupted run has one too.

| file | what |
|---|---|
| `values.json` | tuned, initial and best-epoch values by name, scales, and the meaning of each (bounds, discrete) |
| `schedule.json`, `schedule.csv` | every hyperparameter and its scale, after every outer step |
| `history.json`, `history.csv` | losses of every epoch, and how far each hyperparameter can be trusted |
| `schedule.png` | schedules and losses drawn |
| `model.pt` | weights of the epoch with the lowest validation loss, under the model's own keys (`weights_only=True`) |
"""

import csv
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stn_fx.bilevel.atomic import write_atomically
from stn_fx.bilevel.callbacks import Callback
from stn_fx.bilevel.plot import draw
from stn_fx.bilevel.records import EpochRecord, FitResult, SchedulePoint
from stn_fx.errors import InputError

if TYPE_CHECKING:
    from stn_fx.bilevel.trainer import BilevelTrainer

MARKER = "values.json"
TABLES = ("schedule.json", "schedule.csv", "history.json", "history.csv")
FILES = (MARKER, *TABLES, "schedule.png", "model.pt")


class RunFolder(Callback):
    """Writes the files above: tables after every epoch, weights at every new best epoch, the picture at the end.

    Args:
        path: made with its parents.
        overwrite: whether a run that is there already may be replaced.

    Raises:
        InputError: the path holds another run, or is a file.
    """

    first_process_only = True

    def __init__(self, path: str | Path, overwrite: bool = False) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"The run folder {self.path} is a file. Choose another path.")
        if (self.path / MARKER).exists() and not overwrite:
            raise InputError(f"{self.path} holds a run already. Choose another folder, or allow it to be overwritten.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"The run folder {self.path} cannot be made: {error.strerror}. Choose another path."
            ) from error

    def check(self, trainer: "BilevelTrainer", result: FitResult) -> None:
        if result.resumed_at and result.best and not self._holds(result):
            warnings.warn(
                f"{self.path} is not the folder of the run that goes on: the weights of its best epoch so far "
                f"({result.best.epoch}) are not there, and model.pt is written at a better one only. Give the folder "
                f"of that run, or keep the weights by KeepBest.",
                stacklevel=2,
            )

    def _holds(self, result: FitResult) -> bool:
        """Whether the folder is that of the run so far: it may hold more epochs than the checkpoint, or one less."""
        try:
            theirs = json.loads((self.path / "history.json").read_text())
        except (OSError, ValueError):
            return False
        common = min(len(theirs), len(result.history))
        mine = [asdict(record) for record in result.history[:common]]
        same = json.dumps(theirs[:common]) == json.dumps(mine)  # as text, in which nan equals nan
        assert result.best is not None
        return same and common >= result.best.epoch and (self.path / "model.pt").exists()

    def fit_started(self, trainer: "BilevelTrainer", epochs: int, result: FitResult) -> None:
        if not result.resumed_at:  # nothing of an older run stays beside the new one
            for name in FILES:
                (self.path / name).unlink(missing_ok=True)
        self._write_tables(trainer, result)

    def epoch_ended(self, trainer: "BilevelTrainer", record: EpochRecord, result: FitResult) -> None:
        if result.best is record:
            weights = trainer.stn.model.state_dict()
            write_atomically(self.path / "model.pt", lambda path: torch.save(weights, path))
        self._write_tables(trainer, result)

    def fit_ended(self, trainer: "BilevelTrainer", result: FitResult) -> None:
        self._write_tables(trainer, result)
        if result.history:
            write_atomically(
                self.path / "schedule.png", lambda path: draw(result, trainer.stn.hparams.specs()).savefig(path)
            )

    def _write_tables(self, trainer: "BilevelTrainer", result: FitResult) -> None:
        # A point a line: a long run has tens of thousands of them.
        points = ",\n".join(json.dumps(asdict(point)) for point in result.schedule)
        self._text("schedule.json", f"[\n{points}\n]\n")
        self._csv("schedule.csv", [flat(point) for point in result.schedule])
        self._json("history.json", [asdict(record) for record in result.history])
        if result.history:
            self._csv("history.csv", [record.columns() for record in result.history])
        # Last, because it marks the folder as one that holds a run.
        self._json(MARKER, summary(result, trainer.stn.hparams.specs()))

    def _json(self, name: str, content: Any) -> None:
        self._text(name, json.dumps(content, indent=2) + "\n")

    def _text(self, name: str, text: str) -> None:
        write_atomically(self.path / name, lambda path: path.write_text(text))

    def _csv(self, name: str, rows: list[dict[str, Any]]) -> None:
        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                # An epoch may have columns that others lack: trust is not measured in every one.
                writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self.path / name, write)


def flat(point: SchedulePoint) -> dict[str, float]:
    """One row of `schedule.csv`: counters, then `NAME` for each value, then `NAME scale` for each scale."""
    row: dict[str, float] = {"epoch": point.epoch, "inner_step": point.inner_step, "outer_step": point.outer_step}
    return row | point.values | {f"{name} scale": scale for name, scale in point.scales.items()}


def summary(result: FitResult, specs: list[dict[str, object]]) -> dict[str, object]:
    """Content of `values.json`."""
    best = result.best
    at_best = next((p for p in reversed(result.schedule) if best and p.inner_step <= best.inner_step), None)
    return {
        "values": result.values,
        "initial_values": result.schedule[0].values,
        "scales": result.schedule[-1].scales,
        "best_epoch": best and {**asdict(best), "values": at_best and at_best.values},
        "interrupted": result.interrupted,
        "resumed_at": result.resumed_at,
        "skipped_updates": result.skipped,
        "hyperparameters": specs,
    }
