"""Learning rates over a run: any torch scheduler, stepped once per update of the weights."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, ReduceLROnPlateau, SequentialLR

from stn_fx.arguments import described
from stn_fx.bilevel.algorithm import InnerRecord
from stn_fx.bilevel.callbacks import Callback
from stn_fx.bilevel.optimizers import Role
from stn_fx.bilevel.reader import length_of
from stn_fx.bilevel.records import FitResult
from stn_fx.errors import InputError

if TYPE_CHECKING:
    from stn_fx.bilevel.trainer import BilevelTrainer

WARMUP_PART = 10

SchedulerFactory = Callable[[Optimizer, int], LRScheduler]


def cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """From the optimizer's learning rate to zero over `steps` updates along half a cosine (SGDR, 1608.03983)."""
    return CosineAnnealingLR(optimizer, steps)


def linear(optimizer: Optimizer, steps: int) -> LRScheduler:
    """From the optimizer's learning rate to zero over `steps` updates along a line."""
    return LinearLR(optimizer, 1.0, 0.0, steps)


def warmup_cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Up along a line for the first tenth of `steps` updates, then down as `cosine`."""
    rising = max(1, steps // WARMUP_PART)
    parts = [LinearLR(optimizer, 1 / (rising + 1), 1.0, rising), cosine(optimizer, max(1, steps - rising))]
    return SequentialLR(optimizer, parts, [rising])


class LearningRateSchedule(Callback):
    """Steps a torch scheduler of the base parameters after every update; hyperparameters and scales follow it.

    They follow in proportion to their own rates. Hyperparameters that go on moving around weights that have come to
    rest run away: no later gradient tells them that the weights did not follow (measured on the digits of
    `examples/benchmarks/digits.py`: a rate went from 0.15 to 0.84 and the validation loss from 0.44 to 0.84). The
    response goes on learning at its own rate.

    Args:
        factory: `factory(optimizer, updates)` returns the scheduler of the base optimizer for the whole run.
        followers: groups whose rates follow; those that the algorithm does not train are skipped.

    Raises:
        InputError: (at the start of `fit`) the training loader has no length, so the number of steps is unknown.
    """

    def __init__(self, factory: SchedulerFactory = cosine, followers: Iterable[Role] = ("hyper", "scale")) -> None:
        self.factory = factory
        self.followers = tuple(followers)

    def description(self) -> str:
        return f"LearningRateSchedule({described(self.factory)}, followed by {', '.join(self.followers) or 'none'})"

    def fit_started(self, trainer: "BilevelTrainer", epochs: int, result: FitResult) -> None:
        batches = length_of(trainer.train)
        if batches is None:
            raise InputError(
                "A learning rate schedule needs the number of training batches, and the training loader has no length. "
                "Give it __len__, or leave the schedule out."
            )
        optimizers = trainer.algorithm.optimizers
        self._leader = _rates(optimizers["base"])
        self._followers = [
            (optimizers[role], _rates(optimizers[role])) for role in self.followers if role in optimizers
        ]
        self._inner = 0
        self._accumulate = trainer.algorithm.updates.accumulate
        self._scheduler = self.factory(optimizers["base"], max(1, epochs * batches // self._accumulate))
        if isinstance(self._scheduler, ReduceLROnPlateau):
            raise InputError(
                "ReduceLROnPlateau follows a loss, and schedules here are stepped once per update without one. Use "
                "cosine, linear, or any scheduler whose step() takes no argument."
            )
        self._follow()

    def inner_step_ended(self, trainer: "BilevelTrainer", epoch: int, record: InnerRecord) -> None:
        self._inner += 1
        if self._inner % self._accumulate == 0:
            self._scheduler.step()
            self._follow()

    def fit_ended(self, trainer: "BilevelTrainer", result: FitResult) -> None:
        """All rates as before, so that another `fit` does not begin with those that this one ended with."""
        optimizers = trainer.algorithm.optimizers
        for optimizer, initial in [(optimizers["base"], self._leader), *self._followers]:
            for group, rate in zip(optimizer.param_groups, initial, strict=True):
                group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        followers = [rates for _, rates in self._followers]
        return {
            "scheduler": self._scheduler.state_dict(),
            "inner": self._inner,
            "leader": self._leader,
            "followers": followers,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scheduler.load_state_dict(state["scheduler"])
        self._inner, self._leader = state["inner"], state["leader"]
        optimizers = [optimizer for optimizer, _ in self._followers]
        self._followers = list(zip(optimizers, state["followers"], strict=True))

    def _follow(self) -> None:
        share = sum(self._scheduler.get_last_lr()) / (sum(self._leader) or 1.0)
        for optimizer, initial in self._followers:
            for group, rate in zip(optimizer.param_groups, initial, strict=True):
                group["lr"] = share * rate


def _rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]
