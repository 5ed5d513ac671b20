"""What a run leaves behind: the schedule of the hyperparameters, the history of the losses, the result."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stn_fx.bilevel.trust import Trust, trust_from_json


@dataclass(frozen=True)
class SchedulePoint:
    """The hyperparameters at one moment.

    Attributes:
        epoch: epochs begun, counted from 1; 0 before training.
        inner_step: inner steps done.
        outer_step: outer steps done.
        values: constrained values by name.
        scales: standard deviations of the perturbation in raw space, by name.
    """

    epoch: int
    inner_step: int
    outer_step: int
    values: dict[str, float]
    scales: dict[str, float]


@dataclass(frozen=True)
class EpochRecord:
    """One epoch.

    Attributes:
        epoch: counted from 1.
        inner_step: inner steps done by its end.
        outer_step: outer steps done by its end.
        train_loss: mean training loss of the base pass, regularized as the hyperparameters say; over the steps where it
            is finite, and NaN where there are none.
        response_loss: mean training loss of the linearized pass; None where there was none.
        valid_loss: mean loss on the whole validation set, evaluation mode, unperturbed.
        valid_accuracy: share in [0, 1] of validation examples whose highest score is at the target; None where the
            task is not a classification.
        seconds: wall time of training and evaluation in this epoch.
        skipped: updates that were not applied because loss or gradient was not finite.
        trust: how far each hyperparameter can be trusted, by name; None where it was not measured.
    """

    epoch: int
    inner_step: int
    outer_step: int
    train_loss: float
    response_loss: float | None
    valid_loss: float
    valid_accuracy: float | None
    seconds: float
    skipped: int = 0
    trust: dict[str, Trust] | None = None

    @staticmethod
    def of(content: Mapping[str, Any]) -> "EpochRecord":
        """From what `dataclasses.asdict` gave, also that of a version without all of today's fields."""
        return EpochRecord(**{**content, "trust": trust_from_json(content.get("trust"))})

    def columns(self) -> dict[str, Any]:
        """One row of `history.csv`: losses, then the numbers of every hyperparameter's trust."""
        row = asdict(self)
        del row["trust"]
        for name, each in (self.trust or {}).items():
            row |= each.columns(name)
        return row

    @property
    def order(self) -> float:
        """Validation loss to compare by: one that is not finite comes last."""
        return self.valid_loss if math.isfinite(self.valid_loss) else math.inf


@dataclass
class FitResult:
    """Outcome of `BilevelTrainer.fit`; grows while training, so that an interrupted run has one too.

    Attributes:
        schedule: the hyperparameters before training, and after every outer step (every epoch where there is none).
        history: one record per finished epoch.
        interrupted: whether training stopped before the last epoch.
        resumed_at: inner steps after which the run was taken up again from a checkpoint.
        skipped: updates that were not applied because loss or gradient was not finite.
        resumed_from: the checkpoint that this fit has taken up; not stored.
    """

    schedule: list[SchedulePoint] = field(default_factory=list)
    history: list[EpochRecord] = field(default_factory=list)
    interrupted: bool = False
    resumed_at: list[int] = field(default_factory=list)
    skipped: int = 0
    resumed_from: Path | None = field(default=None, compare=False)

    @property
    def values(self) -> dict[str, float]:
        """The tuned values: those at the end of the schedule."""
        return self.schedule[-1].values

    @property
    def best(self) -> EpochRecord | None:
        """The epoch with the lowest validation loss; None where no epoch was finished."""
        return min(self.history, key=lambda record: record.order, default=None)

    def to_json(self) -> str:
        """The whole result; numbers read back exactly."""
        content = asdict(self)
        del content["resumed_from"]
        return json.dumps(content)

    @staticmethod
    def from_json(text: str) -> "FitResult":
        """What `to_json` wrote."""
        content = json.loads(text)
        schedule = [SchedulePoint(**point) for point in content.pop("schedule")]
        history = [EpochRecord.of(record) for record in content.pop("history")]
        return FitResult(schedule=schedule, history=history, **content)
