"""One training run of `quality.py`: any algorithm, any values to start from, a budget of compute."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from quality_tasks import Task, Values
from torch.optim import SGD

from stn_fx.bilevel import Algorithm, BilevelTrainer, Callback, EpochRecord, FitResult, KeepBest
from stn_fx.bilevel.trainer import usual_warmup
from stn_fx.data import ImageBatches, Splits
from stn_fx.data.batches import Normalisation

if TYPE_CHECKING:
    from stn_fx.transform import ResponseForm, SelfTuningModule

OnEpoch = Callable[[int, float], bool]
"""Is given the number of the epoch and its validation loss; whether the run shall stop."""


@dataclass(frozen=True)
class Cost:
    """Of one step, in updates of the plain model.

    Attributes:
        inner: one inner step.
        outer: one outer step on a batch as large as the training batch.
    """

    inner: float
    outer: float = 0.0


@dataclass(frozen=True)
class Way:
    """How a run trains.

    Attributes:
        algorithm: made for a wrapped model.
        cost: of its steps.
        train_steps: T_train.
        warmup: share of the epochs without outer steps; None for the default of `fit`.
        valid_batch: size of the batches of outer steps.
        response: form of the response.
    """

    algorithm: Callable[["SelfTuningModule"], Algorithm]
    cost: Cost
    train_steps: int = 5
    warmup: float | None = 0.0
    valid_batch: int = 128
    response: "ResponseForm" = "rowwise"

    def epochs(self, task: Task, batches: int, plain_runs: float) -> int:
        """The most epochs that cost no more than this many plain runs."""
        budget, epochs = plain_runs * task.plain_epochs * batches, 0
        while self.compute(task, (epochs + 1) * batches, self._rounds(epochs + 1, batches)) <= budget:
            epochs += 1
        return epochs

    def warmup_epochs(self, epochs: int, batches: int) -> int:
        """Epochs without outer steps."""
        return usual_warmup(epochs, batches) if self.warmup is None else round(self.warmup * epochs)

    def compute(self, task: Task, inner: int, outer: int) -> float:
        """Updates of the plain model that these steps are worth."""
        return inner * self.cost.inner + outer * self.cost.outer * self.valid_batch / task.batch_size

    def _rounds(self, epochs: int, batches: int) -> int:
        if not self.cost.outer:
            return 0
        return epochs * batches // self.train_steps - self.warmup_epochs(epochs, batches) * batches // self.train_steps


@dataclass
class Outcome:
    """What is kept of a run; every number is of the epoch with the lowest validation loss, unless it says otherwise.

    Attributes:
        initial: values at the start.
        values: of the hyperparameters.
        last_values: at the end of the run.
        curve: (compute in plain runs, validation loss) after every epoch.
        trajectory: values after every epoch.
        scales: of the perturbation after every epoch; empty where nothing is tuned.
    """

    initial: Values
    values: Values = field(default_factory=dict)
    last_values: Values = field(default_factory=dict)
    epoch: int = 0
    valid_loss: float = float("inf")
    valid_accuracy: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None
    curve: list[tuple[float, float]] = field(default_factory=list)
    trajectory: list[Values] = field(default_factory=list)
    scales: list[Values] = field(default_factory=list)
    seconds: float = 0.0


class _Stop(Exception):
    """A search wants no more of this run."""


class _Recorder(Callback):
    def __init__(self, task: Task, way: Way, outcome: Outcome, batches: int, on_epoch: OnEpoch | None) -> None:
        self.task, self.way, self.outcome, self.on_epoch = task, way, outcome, on_epoch
        self.plain_run = task.plain_epochs * batches

    def epoch_ended(self, trainer: BilevelTrainer, record: EpochRecord, result: FitResult) -> None:
        compute = self.way.compute(self.task, record.inner_step, record.outer_step) / self.plain_run
        self.outcome.curve.append((compute, record.valid_loss))
        self.outcome.trajectory.append(result.schedule[-1].values)
        if trainer.algorithm.tunes:
            self.outcome.scales.append(result.schedule[-1].scales)
        self.outcome.seconds += record.seconds
        if self.on_epoch is not None and self.on_epoch(record.epoch, record.valid_loss):
            raise _Stop


def sgd(task: Task) -> Callable[..., SGD]:
    """The optimizer of the weights, the same for all methods."""
    return partial(SGD, lr=task.learning_rate, momentum=0.9)


def train(
    task: Task,
    splits: Splits,
    way: Way,
    seed: int,
    initial: Values,
    plain_runs: float = 1.0,
    most_epochs: int | None = None,
    on_epoch: OnEpoch | None = None,
) -> Outcome:
    """Train for as long as the budget lasts; the test set is read once, at the epoch chosen by the validation loss.

    Args:
        task: what is trained.
        splits: its data.
        way: how.
        seed: of weights, order of the data, masks and perturbations.
        initial: values to start from (and to stay at where nothing is tuned).
        plain_runs: budget, in plain runs.
        most_epochs: a further limit.
        on_epoch: called after every epoch.
    """
    normalisation = Normalisation.of(splits.train)
    batches = partial(ImageBatches, normalisation=normalisation)
    training = batches(splits.train, batch_size=task.batch_size, shuffle=True, drop_last=True, seed=2 * seed)
    validation = batches(splits.valid, batch_size=way.valid_batch, shuffle=True, seed=2 * seed + 1)
    stn = task.wrapped(splits, seed, way.response)
    stn.hparams.set_values(initial)
    trainer = BilevelTrainer(stn, train=training, valid=validation, algorithm=way.algorithm(stn))
    epochs = min(way.epochs(task, len(training), plain_runs), most_epochs or 10**9)
    outcome, keep = Outcome(initial), KeepBest()
    with suppress(_Stop):
        trainer.fit(
            epochs,
            warmup_epochs=way.warmup_epochs(epochs, len(training)),
            train_steps=way.train_steps,
            callbacks=[keep, _Recorder(task, way, outcome, len(training), on_epoch)],
            measure_trust=False,
        )
    outcome.last_values = stn.hparams.values()
    keep.restore(trainer)
    assert keep.record is not None
    test = trainer.evaluate(batches(splits.test, batch_size=500))
    outcome.values, outcome.epoch = stn.hparams.values(), keep.record.epoch
    outcome.valid_loss, outcome.valid_accuracy = keep.record.valid_loss, keep.record.valid_accuracy
    outcome.test_loss, outcome.test_accuracy = test.loss, test.accuracy
    return outcome
