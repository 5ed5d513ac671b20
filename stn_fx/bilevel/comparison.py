"""Tuned against fixed: the same model, data order and number of epochs, with and without tuning.

Both runs select their epoch by the validation loss, and the test set is read once for each, at that epoch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from stn_fx.bilevel.callbacks import Callback, KeepBest
from stn_fx.bilevel.evaluation import Evaluation
from stn_fx.bilevel.objective import Loss, Objective
from stn_fx.bilevel.records import FitResult
from stn_fx.bilevel.schedules import LearningRateSchedule, SchedulerFactory
from stn_fx.bilevel.steps import DeltaSTN, DeltaSTNOptions, FixedHyperparameters
from stn_fx.bilevel.trainer import TRAIN_STEPS, BilevelTrainer

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule


@dataclass(frozen=True)
class Recipe:
    """How both runs are trained.

    Attributes:
        epochs: passes over the training data.
        warmup_epochs: see `BilevelTrainer.fit`; so are `train_steps` and `valid_steps`.
        train_steps: T_train.
        valid_steps: T_valid.
        options: of `DeltaSTN`; optimizers as factories, because each run has its own parameters.
        loss: of both.
        schedule: learning rates over the run, see `LearningRateSchedule`; None keeps them constant.
        measure_trust: see `BilevelTrainer.fit`.
    """

    epochs: int
    warmup_epochs: int | None = None
    train_steps: int = TRAIN_STEPS
    valid_steps: int = 1
    options: DeltaSTNOptions = field(default_factory=DeltaSTNOptions)
    loss: Loss | Objective = F.cross_entropy
    schedule: SchedulerFactory | None = None
    measure_trust: bool = True


@dataclass(frozen=True)
class Run:
    """Outcome of one run, at its epoch with the lowest validation loss.

    Attributes:
        result: schedule and history of the whole run.
        valid: on the validation data.
        test: on the test data.
        seconds: wall time of all epochs, also of those before the run was resumed, without the test data.
    """

    result: FitResult
    valid: Evaluation
    test: Evaluation
    seconds: float


def tuned_run(
    stn: "SelfTuningModule",
    recipe: Recipe,
    train: Iterable[Any],
    valid: Iterable[Any],
    test: Iterable[Any],
    callbacks: Sequence[Callback] = (),
    resume_from: Path | None = None,
) -> Run:
    """Train with tuning; `stn` ends in the state of its best epoch. Raises as `BilevelTrainer` does."""
    algorithm = DeltaSTN(stn, recipe.loss, **recipe.options)
    trainer = BilevelTrainer(stn, train=train, valid=valid, algorithm=algorithm)
    return _run(trainer, recipe, test, callbacks, resume_from)


def fixed_run(
    stn: "SelfTuningModule",
    recipe: Recipe,
    train: Iterable[Any],
    valid: Iterable[Any],
    test: Iterable[Any],
    callbacks: Sequence[Callback] = (),
    resume_from: Path | None = None,
) -> Run:
    """Train by the base pass alone at the initial hyperparameters; else as `tuned_run`."""
    base_optimizer, updates = recipe.options.get("base_optimizer"), recipe.options.get("updates")
    algorithm = FixedHyperparameters(stn, recipe.loss, base_optimizer=base_optimizer, updates=updates)
    trainer = BilevelTrainer(stn, train=train, valid=valid, algorithm=algorithm)
    return _run(trainer, recipe, test, callbacks, resume_from)


def _run(
    trainer: BilevelTrainer,
    recipe: Recipe,
    test: Iterable[Any],
    callbacks: Sequence[Callback],
    resume_from: Path | None,
) -> Run:
    keep = KeepBest()
    schedules = [LearningRateSchedule(recipe.schedule)] if recipe.schedule else []
    result = trainer.fit(
        recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
        train_steps=recipe.train_steps,
        valid_steps=recipe.valid_steps,
        callbacks=[keep, *schedules, *callbacks],
        resume_from=resume_from,
        measure_trust=recipe.measure_trust,
    )
    keep.restore(trainer)
    seconds = sum(record.seconds for record in result.history)
    return Run(result, trainer.evaluate(trainer.valid), trainer.evaluate(test), seconds)
