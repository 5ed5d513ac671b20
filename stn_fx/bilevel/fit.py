"""One run of `BilevelTrainer.fit`: its loop, its counters, and its state as a checkpoint keeps it."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from stn_fx.bilevel.algorithm import device_of
from stn_fx.bilevel.callbacks import Callback, SafePoint
from stn_fx.bilevel.checkpoint_file import latest_checkpoint, read_checkpoint, require_same, require_whole
from stn_fx.bilevel.diagnosis import diagnose
from stn_fx.bilevel.epoch_trust import EpochTrust
from stn_fx.bilevel.generators import Generators, State
from stn_fx.bilevel.identity import run_identity
from stn_fx.bilevel.interruption import Interruption, Terminated
from stn_fx.bilevel.loader_checks import (
    require_no_overlap,
    require_repeatable,
    require_same_structure,
    require_usable_losses,
)
from stn_fx.bilevel.reader import BatchReader, beside_a_pass
from stn_fx.bilevel.records import EpochRecord, FitResult, SchedulePoint
from stn_fx.errors import DivergedError, InputError

if TYPE_CHECKING:
    from stn_fx.bilevel.trainer import BilevelTrainer

Record = TypeVar("Record")

PARTS = (
    *("epoch", "inner", "outer", "losses", "response_losses", "skipped", "trust", "seconds", "result", "stn"),
    *("other_buffers", "algorithm", "callbacks", "train", "valid", "generators"),
)
"""Of the state that a run goes on from."""


class Fit:
    """The state of one `fit`: counters, positions in the loaders, the growing result."""

    def __init__(
        self,
        trainer: "BilevelTrainer",
        epochs: int,
        warmup_epochs: int,
        train_steps: int,
        valid_steps: int,
        callbacks: Sequence[Callback],
        measure_trust: bool = True,
    ) -> None:
        self.trainer = trainer
        self.algorithm = trainer.algorithm
        self.epochs = epochs
        self.warmup_epochs = warmup_epochs
        self.train_steps = train_steps
        self.valid_steps = valid_steps
        # Processes that train together have the same result; one of them writes it down.
        first = trainer.algorithm.replicas.rank == 0
        self.callbacks = [each for each in callbacks if first or not each.first_process_only]
        self.result = FitResult()
        self.generators = Generators(trainer.stn, {"train": trainer.train, "valid": trainer.valid})
        self.trust = EpochTrust(trainer.algorithm, self.generators, trainer.train, measure_trust)
        self.training_batches = BatchReader(trainer.train, "training", self.generators)
        self.validation_batches = BatchReader(trainer.valid, "validation", self.generators)
        self._endless_validation = self.validation_batches.endless()
        self.epoch = 1
        self.inner = 0
        self.outer = 0
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.losses: list[float] = []
        self.response_losses: list[float] = []
        self.skipped = 0
        self.seconds_before = 0.0
        self.began = time.perf_counter()

    def run(self, resume_from: str | Path | None) -> FitResult:
        checkpoint = None if resume_from is None else latest_checkpoint(resume_from, self.algorithm.replicas)
        saved = None if checkpoint is None else read_checkpoint(checkpoint)
        before = self.generators.state()
        try:
            self._prepare(before)
        except BaseException:
            self.generators.restore(before)
            raise
        if saved is None or checkpoint is None:
            self._record_schedule(0)
        else:
            require_same(saved[0], self.identity(), checkpoint)
            require_whole(saved[1], dict.fromkeys(PARTS) | {"generators": before}, checkpoint)
            self.result = FitResult.from_json(saved[1]["result"])
            self.result.resumed_at.append(saved[1]["inner"])
            self.result.resumed_from = checkpoint
        for callback in self.callbacks:
            callback.check(self.trainer, self.result)
        self.result.interrupted = True
        with ExitStack() as started:
            with Interruption() as interruption:
                for callback in self.callbacks:
                    callback.fit_started(self.trainer, self.epochs, self.result)
                    started.callback(callback.fit_ended, self.trainer, self.result)
                if saved is not None:
                    self._restore(saved[1])
                while self.epoch <= self.epochs:
                    self._epoch(interruption)
            self.result.interrupted = False
            if self.algorithm.tunes and self.outer == 0:
                warnings.warn(
                    f"Nothing was tuned: {self.inner} inner steps, {self.warmup_epochs} of {self.epochs} epochs of "
                    f"warm-up, left no room for an outer step after every {self.train_steps}. Train longer, or lower "
                    f"train_steps or warmup_epochs.",
                    stacklevel=3,
                )
        return self.result

    def _prepare(self, before: State) -> None:
        """Find out on one batch of each loader whether everything fits, before any training time is spent.

        Args:
            before: the state of all generators, which is that afterwards.
        """
        objective, device = self.algorithm.objective, device_of(self.trainer.stn)
        contents = []
        for name, loader in (("training", self.trainer.train), ("validation", self.trainer.valid)):
            batches = iter(beside_a_pass(loader))
            require_repeatable(loader, batches, name)
            contents.append(next(batches, None))
            if contents[-1] is None:
                raise InputError(f"The {name} loader is empty. Give it at least one batch (mind drop_last=True).")
        require_no_overlap(self.trainer.train, self.trainer.valid)
        require_same_structure(*(objective.batch(content, device).inputs for content in contents))
        train, valid = map(self.algorithm.prepare, contents)
        self.algorithm.begin()
        self.algorithm.require_own_parameters()
        after = self.generators.state()
        with self.algorithm.precision():
            require_usable_losses(self.trainer.stn, objective, train, valid)
        # Those of the model may just have been seeded, by the first batch that it has seen.
        self.generators.restore(before | {name: after[name] for name in ("stn", "mixing")})

    def _epoch(self, interruption: Interruption) -> None:
        self.began = time.perf_counter()
        for content in self.training_batches.rest_of_pass():
            self.trust.before_inner_step(content, self.training_batches.taken, self.inner)
            record = self._diagnosed(self.algorithm.inner_step, content)
            self.inner += 1
            self.losses.append(record.loss)
            self._count_skipped(record.skipped)
            if record.response_loss is not None:
                self.response_losses.append(record.response_loss)
            for callback in self.callbacks:
                callback.inner_step_ended(self.trainer, self.epoch, record)
            if self.algorithm.tunes and self.epoch > self.warmup_epochs and self._round_is_due():
                self._outer_round()
            self._safe_point(interruption)
        self.training_batches.require_batches()
        if self.result.schedule[-1].epoch < self.epoch:
            self._record_schedule(self.epoch)
        valid = self.trainer.evaluate(self.trainer.valid)
        self.result.history.append(
            EpochRecord(
                epoch=self.epoch,
                inner_step=self.inner,
                outer_step=self.outer,
                train_loss=_mean(self.losses),
                response_loss=_mean(self.response_losses) if self.response_losses else None,
                valid_loss=valid.loss,
                valid_accuracy=valid.accuracy,
                seconds=self._seconds(),
                skipped=self.skipped,
                trust=self.trust.end_epoch(),
            )
        )
        for callback in self.callbacks:
            callback.epoch_ended(self.trainer, self.result.history[-1], self.result)
        self.epoch += 1
        self._begin_epoch()
        self._safe_point(interruption, epoch_ended=True)

    def _count_skipped(self, reasons: Sequence[str]) -> None:
        self.skipped += len(reasons)
        self.result.skipped += len(reasons)

    def _round_is_due(self) -> bool:
        return self.inner % (self.train_steps * self.algorithm.updates.accumulate) == 0

    def _outer_round(self) -> None:
        for _ in range(self.valid_steps):
            content = next(self._endless_validation)
            self.trust.before_outer_step(content, self.inner)
            record = self._diagnosed(self.algorithm.outer_step, content)
            self._count_skipped(record.skipped)
            self.outer += 1
            self._record_schedule(self.epoch)
            for callback in self.callbacks:
                callback.outer_step_ended(self.trainer, self.epoch, self.result)

    def _diagnosed(self, step: Callable[[Any], Record], content: Any) -> Record:
        try:
            return step(content)
        except DivergedError as error:
            raise DivergedError(f"{error}\n{diagnose(self.algorithm, content)}") from error

    def _record_schedule(self, epoch: int) -> None:
        hparams = self.trainer.stn.hparams
        scales = dict(zip(hparams.names, hparams.scales().tolist(), strict=True))
        self.result.schedule.append(SchedulePoint(epoch, self.inner, self.outer, hparams.values(), scales))

    def _safe_point(self, interruption: Interruption, epoch_ended: bool = False) -> None:
        # Every process stops at the same update, whichever got the signal.
        asked = float(interruption.received is not None)
        stopping = bool(self.algorithm.replicas.sums([asked], device_of(self.trainer.stn))[0])
        point = SafePoint(
            inner_step=self.inner,
            epoch_ended=epoch_ended,
            stopping=stopping,
            healthy=self._healthy,
            identity=self.identity,
            state=self.state_dict,
        )
        for callback in self.callbacks:
            callback.safe_point(self.trainer, point)
        if stopping:
            interruption.raise_received()
            raise Terminated

    def _healthy(self) -> bool:
        return self.algorithm.healthy and all(bool(p.isfinite().all()) for p in self.trainer.stn.parameters())

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the run that is to be taken up from it."""
        options = ("epochs", "warmup_epochs", "train_steps", "valid_steps")
        return run_identity(
            self.algorithm,
            [each for each in self.callbacks if each.has_state()],
            {"train": self.trainer.train, "valid": self.trainer.valid},
            {name: getattr(self, name) for name in options},
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from."""
        stn = self.trainer.stn
        persistent = stn.state_dict()
        return {
            "epoch": self.epoch,
            "inner": self.inner,
            "outer": self.outer,
            "losses": self.losses,
            "response_losses": self.response_losses,
            "skipped": self.skipped,
            "trust": self.trust.found,
            "seconds": self._seconds(),
            "result": self.result.to_json(),
            "stn": persistent,
            "other_buffers": {
                name: each for name, each in stn.model.named_buffers() if f"model.{name}" not in persistent
            },
            "algorithm": self.algorithm.state_dict(),
            "callbacks": [each.state_dict() for each in self.callbacks if each.has_state()],
            "train": self.training_batches.state(),
            "valid": self.validation_batches.state(),
            "generators": self.generators.state(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; the result is there already, for the callbacks' start."""
        stn = self.trainer.stn
        stn.load_state_dict(state["stn"])
        buffers = dict(stn.model.named_buffers())
        with torch.no_grad():
            for name, value in state["other_buffers"].items():
                buffers[name].copy_(value)
        with_state = [each for each in self.callbacks if each.has_state()]
        for callback, theirs in zip(with_state, state["callbacks"], strict=True):
            callback.load_state_dict(theirs)
        # After the schedules, which write learning rates into the optimizers when they are built.
        self.algorithm.load_state_dict(state["algorithm"])
        self.epoch, self.inner, self.outer = state["epoch"], state["inner"], state["outer"]
        self.losses, self.response_losses = state["losses"], state["response_losses"]
        self.skipped, self.seconds_before = state["skipped"], state["seconds"]
        self.trust.found = state["trust"]
        self.validation_batches.restore(state["valid"])
        self.training_batches.restore(state["train"])
        # Last: beginning the passes again has drawn from the generators.
        self.generators.restore(state["generators"])


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
