"""How progress leaves a trainer: the interface of callbacks, and one that keeps the best weights."""

from typing import TYPE_CHECKING

from torch import Tensor

from stn_fx.bilevel.algorithm import InnerRecord
from stn_fx.bilevel.records import EpochRecord, FitResult

if TYPE_CHECKING:
    from stn_fx.bilevel.trainer import BilevelTrainer


class Callback:
    """Does nothing at every event; override what you need."""

    def fit_started(self, trainer: "BilevelTrainer", epochs: int, result: FitResult) -> None:
        """Before the first epoch; the model is captured, `result` grows during training."""

    def inner_step_ended(self, trainer: "BilevelTrainer", epoch: int, record: InnerRecord) -> None:
        """After every inner step."""

    def outer_step_ended(self, trainer: "BilevelTrainer", epoch: int, result: FitResult) -> None:
        """After every outer step; the new values are the last of `result.schedule`."""

    def epoch_ended(self, trainer: "BilevelTrainer", record: EpochRecord, result: FitResult) -> None:
        """After every epoch, evaluation included; `record` is the last of `result.history`."""

    def fit_ended(self, trainer: "BilevelTrainer", result: FitResult) -> None:
        """Always, also when training was interrupted or failed."""


class KeepBest(Callback):
    """Keeps a copy of the wrapper's state (weights, response, hyperparameters) at the lowest validation loss."""

    def __init__(self) -> None:
        self.record: EpochRecord | None = None
        self._state: dict[str, object] = {}

    def epoch_ended(self, trainer: "BilevelTrainer", record: EpochRecord, result: FitResult) -> None:
        if self.record is None or record.valid_loss < self.record.valid_loss:
            self.record = record
            state = trainer.stn.state_dict()
            self._state = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}

    def restore(self, trainer: "BilevelTrainer") -> None:
        """Put the state of the best epoch back in place; nothing where no epoch was finished."""
        if self._state:
            trainer.stn.load_state_dict(self._state)
