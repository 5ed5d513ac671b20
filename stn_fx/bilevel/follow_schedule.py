"""Training along hyperparameters that an earlier run found: the schedule experiment of the STN paper, section 4.1.

The base pass alone trains: no response is learned, nothing is perturbed, no validation gradient is taken::

    stn = transform(model, hparams, example_inputs, response=None)  # untrained
    result = replay(stn, read_run("runs/mine").result.schedule, epochs, train=train, valid=valid)

`FollowSchedule` is the callback that does it, for runs that need more of the trainer.

`schedule.json` is a list of points in time order, each `{"epoch", "inner_step", "outer_step", "values": {name: value},
"scales": {name: scale}}`; the values of a point hold from its inner step to that of the next one.
"""

import math
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from stn_fx.bilevel.algorithm import InnerRecord
from stn_fx.bilevel.apply import UpdateOptions
from stn_fx.bilevel.callbacks import Callback
from stn_fx.bilevel.objective import Loss, Objective
from stn_fx.bilevel.optimizers import OptimizerChoice
from stn_fx.bilevel.reader import length_of
from stn_fx.bilevel.records import FitResult, SchedulePoint
from stn_fx.bilevel.steps import FixedHyperparameters
from stn_fx.bilevel.trainer import BilevelTrainer
from stn_fx.errors import InputError
from stn_fx.hparams import HyperparameterSpace

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule

INSIDE = 1e-6
"""Share of its range that a value at a bound is moved inside: raw values of the bounds themselves are infinite."""


def replay(
    stn: "SelfTuningModule",
    schedule: Sequence[SchedulePoint],
    epochs: int,
    *,
    train: Iterable[Any],
    valid: Iterable[Any],
    loss: Loss | Objective = F.cross_entropy,
    base_optimizer: OptimizerChoice = None,
    updates: UpdateOptions | None = None,
    perturbed: bool = False,
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
) -> FitResult:
    """Train a model from scratch along a schedule: all of it, or `schedule[-1:]` for its final values.

    Args:
        stn: a wrapped model with the hyperparameters of the schedule, untrained; trained in place. It needs no
            response: `transform(..., response=None)`.
        schedule: as `result.schedule` or `read_run(folder).result.schedule` gives it.
        epochs: passes over the training loader.
        train: training batches.
        valid: validation batches, for the history.
        loss: as for `DeltaSTN`; so are `base_optimizer` and `updates`.
        perturbed: see `FollowSchedule`; so is `seed`.
        callbacks: further ones, such as `KeepBest` or `RunFolder`.

    Raises:
        InputError: as `FollowSchedule` and `BilevelTrainer.fit`.
    """
    algorithm = FixedHyperparameters(stn, loss, base_optimizer=base_optimizer, updates=updates)
    trainer = BilevelTrainer(stn, train=train, valid=valid, algorithm=algorithm)
    return trainer.fit(epochs, callbacks=[FollowSchedule(schedule, perturbed, seed), *callbacks])


class FollowSchedule(Callback):
    """Sets the hyperparameters before every inner step to those of a schedule.

    Args:
        schedule: in time order; a single point holds for the whole run.
        perturbed: whether each inner step moves all raw values by Gaussian noise of the schedule's scales, one draw for
            a whole batch: is it the schedule that helps, or the noise around its values?
        seed: of that noise.

    Raises:
        InputError: the schedule is empty, or (at the start of `fit`) names other hyperparameters than the model has.

    Warns:
        UserWarning: the run ends before the schedule does.
    """

    def __init__(self, schedule: Sequence[SchedulePoint], perturbed: bool = False, seed: int = 0) -> None:
        if not schedule:
            raise InputError("The schedule has no point, so there is nothing to follow.")
        self.schedule = list(schedule)
        self.perturbed = perturbed
        self._generator = torch.Generator().manual_seed(seed)
        self._steps = [point.inner_step for point in self.schedule]
        self._inner = 0

    def fit_started(self, trainer: BilevelTrainer, epochs: int, result: FitResult) -> None:
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
        batches, last = length_of(trainer.train), self._steps[-1]
        if batches is not None and len(self.schedule) > 1 and epochs * batches < last:
            warnings.warn(
                f"The schedule goes on to inner step {last}, and this run ends after {epochs * batches}: the rest is "
                f"not followed. Train with the same batch size and at least as many epochs.",
                stacklevel=4,
            )

    def inner_step_ended(self, trainer: BilevelTrainer, epoch: int, record: InnerRecord) -> None:
        self._inner += 1
        self._set(trainer.stn.hparams)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self._inner, "noise": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner = state["inner"]
        self._generator.set_state(state["noise"])

    def _set(self, space: HyperparameterSpace) -> None:
        point = self.schedule[max(0, bisect_right(self._steps, self._inner) - 1)]
        space.set_values({each.name: _inside(point.values[each.name], each.low, each.high) for each in space.resolved})
        if self.perturbed:
            scale_H = space.raw.new_tensor([point.scales[name] for name in space.names])
            noise_H = torch.randn(len(space), generator=self._generator, dtype=space.raw.dtype).to(space.raw.device)
            with torch.no_grad():
                space.raw.add_(scale_H * noise_H)


def _inside(value: float, low: float, high: float) -> float:
    margin = INSIDE * (high - low) if math.isfinite(high) else INSIDE
    if value <= low:
        return low + margin
    return high - margin if value >= high else value
