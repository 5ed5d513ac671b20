"""`WeightAverage`: an exponential moving average of the weights beside the training (Polyak & Juditsky 1992)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stn_fx.bilevel.algorithm import InnerRecord
from stn_fx.bilevel.callbacks import Callback
from stn_fx.bilevel.evaluation import Evaluation
from stn_fx.bilevel.records import EpochRecord, FitResult
from stn_fx.errors import InputError

if TYPE_CHECKING:
    from stn_fx.bilevel.trainer import BilevelTrainer


class WeightAverage(Callback):
    """Averages the user's weights after every update; training and tuning go on from the weights themselves.

    Args:
        decay: share of the average that stays at each update, in (0, 1).

    Attributes:
        model: a copy of the user's model with the averaged weights and the latest buffers; there once `fit` began.
        evaluations: of the averaged weights on the validation data, after every epoch.
    """

    model: torch.nn.Module

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise InputError(f"decay={decay}: it must lie between 0 and 1.")
        self.decay = decay
        self.evaluations: list[Evaluation] = []

    def description(self) -> str:
        return f"WeightAverage({self.decay})"

    def fit_started(self, trainer: "BilevelTrainer", epochs: int, result: FitResult) -> None:
        self._average = AveragedModel(trainer.stn.model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        self._inner = 0
        self.model = self._average.module

    def inner_step_ended(self, trainer: "BilevelTrainer", epoch: int, record: InnerRecord) -> None:
        self._inner += 1
        if self._inner % trainer.algorithm.updates.accumulate == 0:
            self._average.update_parameters(trainer.stn.model)

    def epoch_ended(self, trainer: "BilevelTrainer", record: EpochRecord, result: FitResult) -> None:
        with self.in_place(trainer):
            self.evaluations.append(trainer.evaluate(trainer.valid))

    @contextmanager
    def in_place(self, trainer: "BilevelTrainer") -> Iterator[None]:
        """The averaged weights in the user's model for the duration, its own ones afterwards."""
        own = [parameter.detach().clone() for parameter in trainer.stn.model.parameters()]
        self.apply(trainer)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(trainer.stn.model.parameters(), own, strict=True):
                    parameter.copy_(value)

    @torch.no_grad()
    def apply(self, trainer: "BilevelTrainer") -> None:
        """Put the averaged weights into the user's model for good."""
        for parameter, average in zip(trainer.stn.model.parameters(), self.model.parameters(), strict=True):
            parameter.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        evaluations = [(each.loss, each.accuracy, each.examples) for each in self.evaluations]
        return {"average": self._average.state_dict(), "inner": self._inner, "evaluations": evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average.load_state_dict(state["average"])
        self._inner = state["inner"]
        self.evaluations = [Evaluation(*each) for each in state["evaluations"]]
