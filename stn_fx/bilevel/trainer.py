"""`BilevelTrainer`: epochs of inner and outer steps over any two loaders, with a record of all that happened."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import torch.nn.functional as F

from stn_fx.bilevel.algorithm import Algorithm
from stn_fx.bilevel.batch import cycle
from stn_fx.bilevel.callbacks import Callback
from stn_fx.bilevel.evaluation import Evaluation, evaluate
from stn_fx.bilevel.objective import Loss, Objective
from stn_fx.bilevel.records import EpochRecord, FitResult, SchedulePoint
from stn_fx.bilevel.steps import DeltaSTN, DeltaSTNOptions
from stn_fx.errors import InputError

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule


class BilevelTrainer:
    """Trains a wrapped model and tunes its hyperparameters in one run.

    Args:
        stn: the wrapped model; trained in place.
        loss: `loss(output, target)` or an `Objective`.
        train: iterable of training batches; one pass over it is an epoch.
        valid: iterable of validation batches, of the same structure; started anew whenever it ends.
        algorithm: what the steps do; `DeltaSTN(stn, loss, **options)` where None. Its own loss counts then.
        **options: optimizers and entropy weight, see `DeltaSTN`.

    Raises:
        InputError: an optimizer does not fit, both `algorithm` and its options are given, or `train` and `valid` are
            the same object.
    """

    def __init__(
        self,
        stn: "SelfTuningModule",
        loss: Loss | Objective = F.cross_entropy,
        *,
        train: Iterable[Any],
        valid: Iterable[Any],
        algorithm: Algorithm | None = None,
        **options: Unpack[DeltaSTNOptions],
    ) -> None:
        if train is valid:
            raise InputError(
                "train and valid are the same loader. Hyperparameters tuned on the training data switch all "
                "regularization off; hold out some examples for validation."
            )
        if isinstance(train, Iterator) or isinstance(valid, Iterator):
            raise InputError(
                "train and valid must be iterable many times, and an iterator ends after one pass. Pass the DataLoader "
                "or a list of batches."
            )
        if algorithm is not None and options:
            raise InputError(
                f"{', '.join(options)}: given beside an algorithm, which has its own. Pass them to the algorithm."
            )
        self.algorithm = algorithm or DeltaSTN(stn, loss, **options)
        if self.algorithm.stn is not stn:
            raise InputError("The algorithm was made for another wrapped model. Build both over the same one.")
        self.stn = stn
        self.train = train
        self.valid = valid

    def fit(
        self,
        epochs: int = 50,
        *,
        warmup_epochs: int | None = None,
        train_steps: int = 5,
        valid_steps: int = 1,
        callbacks: Sequence[Callback] = (),
    ) -> FitResult:
        """Train for a number of epochs.

        Args:
            epochs: passes over the training loader.
            warmup_epochs: epochs at the start without outer steps: the response is learned first, and an undertrained
                model wants no regularization. None = a tenth of all, at least one where there is more than one.
            train_steps: T_train, inner steps between two rounds of outer steps (the papers' usual choice is 5).
            valid_steps: T_valid, outer steps in a round (1).
            callbacks: called in this order at every event.

        Returns:
            The result; on KeyboardInterrupt, which is raised again, callbacks have seen what there was of it.

        Raises:
            InputError: an option is out of range, a loader is empty, or batch or loss has the wrong form.
            DivergedError: a loss or a gradient is not finite.
        """
        options = {"epochs": epochs, "train_steps": train_steps, "valid_steps": valid_steps}
        for name, value in options.items():
            if value < 1:
                raise InputError(f"{name}={value}: at least 1 is needed.")
        if warmup_epochs is None:
            warmup_epochs = max(epochs // 10, min(1, epochs - 1))
        if warmup_epochs < 0:
            raise InputError(f"warmup_epochs={warmup_epochs}: it cannot be negative.")
        if self.algorithm.tunes and warmup_epochs >= epochs:
            raise InputError(
                f"warmup_epochs={warmup_epochs} leaves none of {epochs} epochs for tuning. Lower it, or train longer."
            )
        return _Fit(self, warmup_epochs, train_steps, valid_steps, callbacks).run(epochs)

    def evaluate(self, loader: Iterable[Any]) -> Evaluation:
        """Mean loss and accuracy of the model as it stands, in evaluation mode."""
        return evaluate(self.stn, self.algorithm.objective, loader)


class _Fit:
    """The state of one `fit`: counters, the cycled validation loader, the growing result."""

    def __init__(
        self,
        trainer: BilevelTrainer,
        warmup_epochs: int,
        train_steps: int,
        valid_steps: int,
        callbacks: Sequence[Callback],
    ) -> None:
        self.trainer = trainer
        self.algorithm = trainer.algorithm
        self.warmup_epochs = warmup_epochs
        self.train_steps = train_steps
        self.valid_steps = valid_steps
        self.callbacks = callbacks
        self.result = FitResult()
        self.validation_batches = cycle(trainer.valid)
        self.inner = 0
        self.outer = 0

    def run(self, epochs: int) -> FitResult:
        self._prepare()
        self._record_schedule(0)
        self.result.interrupted = True
        try:
            for callback in self.callbacks:
                callback.fit_started(self.trainer, epochs, self.result)
            for epoch in range(1, epochs + 1):
                self._epoch(epoch)
            self.result.interrupted = False
        finally:
            for callback in self.callbacks:
                callback.fit_ended(self.trainer, self.result)
        return self.result

    def _prepare(self) -> None:
        """Find out on one batch of each loader whether the structure fits, before any training time is spent."""
        for name, loader in (("training", self.trainer.train), ("validation", self.trainer.valid)):
            content = next(iter(loader), None)
            if content is None:
                raise InputError(f"The {name} loader is empty. Give it at least one batch (mind drop_last=True).")
            self.algorithm.prepare(content)

    def _epoch(self, epoch: int) -> None:
        began = time.perf_counter()
        losses: list[float] = []
        response_losses: list[float] = []
        for content in self.trainer.train:
            record = self.algorithm.inner_step(content)
            self.inner += 1
            losses.append(record.loss)
            if record.response_loss is not None:
                response_losses.append(record.response_loss)
            for callback in self.callbacks:
                callback.inner_step_ended(self.trainer, epoch, record)
            if self.algorithm.tunes and epoch > self.warmup_epochs and self.inner % self.train_steps == 0:
                self._outer_round(epoch)
        if self.result.schedule[-1].epoch < epoch:
            self._record_schedule(epoch)
        valid = self.trainer.evaluate(self.trainer.valid)
        self.result.history.append(
            EpochRecord(
                epoch=epoch,
                inner_step=self.inner,
                outer_step=self.outer,
                train_loss=_mean(losses),
                response_loss=_mean(response_losses) if response_losses else None,
                valid_loss=valid.loss,
                valid_accuracy=valid.accuracy,
                seconds=time.perf_counter() - began,
            )
        )
        for callback in self.callbacks:
            callback.epoch_ended(self.trainer, self.result.history[-1], self.result)

    def _outer_round(self, epoch: int) -> None:
        for _ in range(self.valid_steps):
            self.algorithm.outer_step(next(self.validation_batches))
            self.outer += 1
            self._record_schedule(epoch)
            for callback in self.callbacks:
                callback.outer_step_ended(self.trainer, epoch, self.result)

    def _record_schedule(self, epoch: int) -> None:
        hparams = self.trainer.stn.hparams
        scales = dict(zip(hparams.names, hparams.scales().tolist(), strict=True))
        self.result.schedule.append(SchedulePoint(epoch, self.inner, self.outer, hparams.values(), scales))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
