"""How progress leaves a trainer: the interface of callbacks, and one that keeps the best weights."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stn_fx.bilevel.algorithm import InnerRecord
from stn_fx.bilevel.records import EpochRecord, FitResult

if TYPE_CHECKING:
    from stn_fx.bilevel.trainer import BilevelTrainer


@dataclass(frozen=True)
class SafePoint:
    """A moment between updates, when everything is consistent and can be saved.

    Attributes:
        inner_step: inner steps done.
        epoch_ended: whether an epoch has just ended, evaluation included.
        stopping: whether the run is about to stop, because a signal asked for it.
        healthy: whether the last updates were applied and everything is finite, so that this is worth keeping.
        identity: whose state it is, see `stn_fx.bilevel.checkpoint_file`.
        state: everything that training goes on from; tensors are live, not copies.
    """

    inner_step: int
    epoch_ended: bool
    stopping: bool
    healthy: Callable[[], bool]
    identity: Callable[[], dict[str, Any]]
    state: Callable[[], dict[str, Any]]


class Callback:
    """Does nothing at every event; override what you need.

    Attributes:
        first_process_only: whether only the first of several processes that train together has this callback, because
            it writes down what all of them have.
    """

    first_process_only = False

    def check(self, trainer: "BilevelTrainer", result: FitResult) -> None:
        """Raise where this callback cannot take part; write nothing yet, since another one may refuse too."""

    def fit_started(self, trainer: "BilevelTrainer", epochs: int, result: FitResult) -> None:
        """Before the first epoch; the model is captured, `result` grows during training."""

    def inner_step_ended(self, trainer: "BilevelTrainer", epoch: int, record: InnerRecord) -> None:
        """After every inner step."""

    def outer_step_ended(self, trainer: "BilevelTrainer", epoch: int, result: FitResult) -> None:
        """After every outer step; the new values are the last of `result.schedule`."""

    def epoch_ended(self, trainer: "BilevelTrainer", record: EpochRecord, result: FitResult) -> None:
        """After every epoch, evaluation included; `record` is the last of `result.history`."""

    def safe_point(self, trainer: "BilevelTrainer", point: SafePoint) -> None:
        """After every inner step with the outer steps that follow it, and after every epoch."""

    def fit_ended(self, trainer: "BilevelTrainer", result: FitResult) -> None:
        """Always, also when training was interrupted or failed."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of this callback, as tensors and plain data; override it where there is any."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; called after `fit_started`."""

    def description(self) -> str:
        """What a run and its checkpoint must agree on about this callback, for people to read."""
        return type(self).__qualname__

    def has_state(self) -> bool:
        """Whether a resumed run needs anything of this callback: whether its class overrides `state_dict`."""
        return type(self).state_dict is not Callback.state_dict


class KeepBest(Callback):
    """Keeps a copy of the wrapper's state (weights, response, hyperparameters) at the lowest validation loss."""

    def __init__(self) -> None:
        self.record: EpochRecord | None = None
        self._state: dict[str, Any] = {}

    def epoch_ended(self, trainer: "BilevelTrainer", record: EpochRecord, result: FitResult) -> None:
        if self.record is None or record.order < self.record.order:
            self.record = record
            state = trainer.stn.state_dict()
            self._state = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}

    def restore(self, trainer: "BilevelTrainer") -> None:
        """Put the state of the best epoch back in place; nothing where no epoch was finished."""
        if self._state:
            trainer.stn.load_state_dict(self._state)

    def state_dict(self) -> dict[str, Any]:
        return {"record": self.record and asdict(self.record), "state": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.record = state["record"] and EpochRecord.of(state["record"])
        self._state = state["state"]
