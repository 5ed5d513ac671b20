"""`BilevelTrainer`: epochs of inner and outer steps over any two loaders, with a record of all that happened."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from stn_fx.arguments import require_count
from stn_fx.bilevel.algorithm import Algorithm, device_of
from stn_fx.bilevel.callbacks import Callback, SafePoint
from stn_fx.bilevel.checkpoint_file import latest_checkpoint, read_checkpoint, require_same
from stn_fx.bilevel.diagnosis import diagnose
from stn_fx.bilevel.epoch_trust import EpochTrust
from stn_fx.bilevel.evaluation import Evaluation, evaluate
from stn_fx.bilevel.generators import Generators
from stn_fx.bilevel.interruption import Interruption, Terminated
from stn_fx.bilevel.loader_checks import require_no_overlap, require_same_structure, require_usable_losses
from stn_fx.bilevel.objective import Loss, Objective
from stn_fx.bilevel.reader import BatchReader, beside_a_pass, length_of
from stn_fx.bilevel.records import EpochRecord, FitResult, SchedulePoint
from stn_fx.bilevel.steps import DeltaSTN, DeltaSTNOptions
from stn_fx.errors import DivergedError, InputError

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule

Record = TypeVar("Record")


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
        loss: Loss | Objective | None = None,
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
        given = [*options, *([] if loss is None else ["loss"])]
        if algorithm is not None and given:
            raise InputError(
                f"{', '.join(given)}: given beside an algorithm, which has its own. Pass them to the algorithm."
            )
        self.algorithm = algorithm or DeltaSTN(stn, F.cross_entropy if loss is None else loss, **options)
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
        resume_from: str | Path | None = None,
        measure_trust: bool = True,
    ) -> FitResult:
        """Train for a number of epochs.

        Args:
            epochs: passes over the training loader.
            warmup_epochs: epochs at the start without outer steps: the response is learned first, and an undertrained
                model wants no regularization. None = two fifths of all, at least one where there is more than one.
            train_steps: T_train, inner steps between two rounds of outer steps (the papers' usual choice is 5).
            valid_steps: T_valid, outer steps in a round (1).
            callbacks: called in this order at every event.
            resume_from: a checkpoint that the callback `Checkpoint` wrote, or its folder for the latest one; everything
                else as in the run that wrote it.
            measure_trust: whether to measure once in every epoch how far each hyperparameter can be trusted, see
                `stn_fx.bilevel.trust`. It takes about as long as two updates and does not touch the run.

        Returns:
            The result.

        Raises:
            InputError: an option is out of range, a loader is empty, or batch or loss has the wrong form.
            CheckpointError: the checkpoint cannot be read, or is of another model, version or run.
            DivergedError: too many updates in a row were skipped, because loss or gradient was not finite.
            KeyboardInterrupt: Ctrl-C (or its kind `Terminated`: SIGTERM); raised between two updates, after callbacks
                have seen what there was of the result. A second signal acts at once.
        """
        options = {"epochs": epochs, "train_steps": train_steps, "valid_steps": valid_steps}
        for name, value in options.items():
            require_count(name, value, 1)
        if warmup_epochs is None:
            warmup_epochs = max(2 * epochs // 5, min(1, epochs - 1))
        require_count("warmup_epochs", warmup_epochs, 0)
        if self.algorithm.tunes and warmup_epochs >= epochs:
            raise InputError(
                f"warmup_epochs={warmup_epochs} leaves none of {epochs} epochs for tuning. Lower it, or train longer."
            )
        return _Fit(self, epochs, warmup_epochs, train_steps, valid_steps, callbacks, measure_trust).run(resume_from)

    def evaluate(self, loader: Iterable[Any]) -> Evaluation:
        """Mean loss and accuracy of the model as it stands, in evaluation mode and in the precision of the updates.

        A run that goes on is left alone: its generators and its pass over the same loader.
        """
        loaders = {"train": self.train, "valid": self.valid, "evaluated": loader}
        with Generators(self.stn, loaders).untouched(), self.algorithm.precision():
            return evaluate(self.stn, self.algorithm.objective, beside_a_pass(loader))


class _Fit:
    """The state of one `fit`: counters, positions in the loaders, the growing result."""

    def __init__(
        self,
        trainer: BilevelTrainer,
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
        self._prepare()
        if saved is None or checkpoint is None:
            self._record_schedule(0)
        else:
            require_same(saved[0], self.identity(), checkpoint)
            self.result = FitResult.from_json(saved[1]["result"])
            self.result.resumed_at.append(saved[1]["inner"])
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

    def _prepare(self) -> None:
        """Find out on one batch of each loader whether everything fits, before any training time is spent."""
        objective, device = self.algorithm.objective, device_of(self.trainer.stn)
        before = self.generators.state()
        contents = []
        for name, loader in (("training", self.trainer.train), ("validation", self.trainer.valid)):
            contents.append(next(iter(beside_a_pass(loader)), None))
            if contents[-1] is None:
                raise InputError(f"The {name} loader is empty. Give it at least one batch (mind drop_last=True).")
        require_no_overlap(self.trainer.train, self.trainer.valid)
        require_same_structure(*(objective.batch(content, device).inputs for content in contents))
        train, valid = map(self.algorithm.prepare, contents)
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
        """What a checkpoint must agree on with the run that is to be taken up from it, for people to read."""
        stn = self.trainer.stn
        tensors = {name: value for name, value in stn.state_dict().items() if isinstance(value, Tensor)}
        return {
            "model": f"{type(stn.model).__module__}.{type(stn.model).__qualname__}",
            "tensor": {name: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in tensors.items()},
            "hyperparameter": {
                str(spec["name"]): {key: spec[key] for key in ("low", "high", "discrete")}
                for spec in stn.hparams.specs()
            },
            "module": {name or "model": type(module).__qualname__ for name, module in stn.model.named_modules()},
            "algorithm": self.algorithm.description(),
            "optimizer": {role: _settings(each) for role, each in self.algorithm.optimizers.items()},
            "callback": [type(each).__qualname__ for each in self.callbacks if each.has_state()],
            "batches of the loader": {
                name: batches
                for name, loader in (("train", self.trainer.train), ("valid", self.trainer.valid))
                if (batches := length_of(loader)) is not None
            },
            "option": {
                "epochs": self.epochs,
                "warmup_epochs": self.warmup_epochs,
                "train_steps": self.train_steps,
                "valid_steps": self.valid_steps,
            },
        }

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


def _settings(optimizer: Optimizer) -> dict[str, Any]:
    """Class and plain options, as it was built: schedules change the rates of its groups, not these."""
    plain = {name: value for name, value in optimizer.defaults.items() if isinstance(value, (bool, int, float, tuple))}
    return {"class": type(optimizer).__qualname__} | {name: str(value) for name, value in plain.items()}


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
