"""Reading what a run folder holds, as the run wrote it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stn_fx.bilevel.records import EpochRecord, FitResult, SchedulePoint
from stn_fx.errors import InputError


@dataclass(frozen=True)
class RecordedRun:
    """A run as its folder tells it.

    Attributes:
        folder: where it is.
        result: schedule and history.
        summary: content of `values.json`.
    """

    folder: Path
    result: FitResult
    summary: dict[str, Any]

    @property
    def specs(self) -> list[dict[str, Any]]:
        """Meaning of each hyperparameter, as `HyperparameterSpace.specs` gave it."""
        return self.summary["hyperparameters"]


def read_run(folder: str | Path) -> RecordedRun:
    """Read a run folder.

    Raises:
        InputError: it holds no run, or files that are not of this version.
    """
    folder = Path(folder)
    try:
        summary, schedule, history = (
            json.loads((folder / name).read_text()) for name in ("values.json", "schedule.json", "history.json")
        )
        result = FitResult(
            schedule=[SchedulePoint(**point) for point in schedule],
            history=[EpochRecord.of(record) for record in history],
            interrupted=summary["interrupted"],
            resumed_at=summary["resumed_at"],
            skipped=summary["skipped_updates"],
        )
        summary["hyperparameters"]  # read later: its absence belongs to this error
    except OSError as error:
        raise InputError(
            f"{folder} holds no run ({error.filename}: {error.strerror}). Give the folder of a `RunFolder`, as "
            f"`stn-fx tune` prints it."
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"The files of {folder} are not of this version of stn_fx ({type(error).__name__}: {error})."
        ) from error
    return RecordedRun(folder, result, summary)


def require_history(run: RecordedRun) -> None:
    """InputError where no epoch was finished, so that there is nothing to show."""
    if not run.result.history:
        raise InputError(f"No epoch of the run in {run.folder} is finished yet, so there is nothing to show.")
