"""Training along hyperparameters that an earlier run found: the schedule experiment of the STN paper, section 4.1.

The base pass alone trains: no response parameters, no perturbations, no validation gradient. `FollowSchedule` turns
`FixedHyperparameters` into such a run::

    trainer = BilevelTrainer(stn, train=train, valid=valid, algorithm=FixedHyperparameters(stn))
    trainer.fit(epochs, callbacks=[FollowSchedule(read_run("runs/mine").result.schedule)])

`schedule.json` is a list of points in time order, each `{"epoch", "inner_step", "outer_step", "values": {name: value},
"scales": {name: scale}}`; the values of a point hold from its inner step to that of the next one.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stn_fx.bilevel.algorithm import InnerRecord
from stn_fx.bilevel.callbacks import Callback
from stn_fx.bilevel.records import FitResult, SchedulePoint
from stn_fx.errors import InputError
from stn_fx.hparams import HyperparameterSpace

if TYPE_CHECKING:
    from stn_fx.bilevel.trainer import BilevelTrainer

INSIDE = 1e-6
"""Share of its range that a value at a bound is moved inside: raw values of the bounds themselves are infinite."""


class FollowSchedule(Callback):
    """Sets the hyperparameters before every inner step to those of a schedule.

    Args:
        schedule: in time order; a single point holds for the whole run.

    Raises:
        InputError: the schedule is empty, or (at the start of `fit`) names other hyperparameters than the model has.
    """

    def __init__(self, schedule: Sequence[SchedulePoint]) -> None:
        if not schedule:
            raise InputError("The schedule has no point, so there is nothing to follow.")
        self.schedule = list(schedule)
        self._steps = [point.inner_step for point in self.schedule]
        self._inner = 0

    def fit_started(self, trainer: "BilevelTrainer", epochs: int, result: FitResult) -> None:
        if trainer.algorithm.tunes:
            raise InputError(
                "FollowSchedule sets the hyperparameters, and this algorithm tunes them. Use FixedHyperparameters."
            )
        theirs, ours = set(self.schedule[0].values), set(trainer.stn.hparams.names)
        if theirs != ours:
            raise InputError(
                f"The schedule is of other hyperparameters: only in it: {', '.join(sorted(theirs - ours)) or 'none'}; "
                f"only in the model: {', '.join(sorted(ours - theirs)) or 'none'}. Use the same model and hparams."
            )
        self._inner = 0
        self._set(trainer.stn.hparams)

    def inner_step_ended(self, trainer: "BilevelTrainer", epoch: int, record: InnerRecord) -> None:
        self._inner += 1
        self._set(trainer.stn.hparams)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self._inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner = state["inner"]

    def _set(self, space: HyperparameterSpace) -> None:
        point = self.schedule[max(0, bisect_right(self._steps, self._inner) - 1)]
        inside = {}
        for each in space.resolved:
            margin = INSIDE * (each.high - each.low)
            inside[each.name] = min(max(point.values[each.name], each.low + margin), each.high - margin)
        space.set_values(inside)
