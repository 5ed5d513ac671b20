"""Learning rates over a run: any torch scheduler, stepped once per inner step."""

from collections.abc import Callable, Iterable, Sized
from typing import TYPE_CHECKING

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from stn_fx.bilevel.algorithm import InnerRecord
from stn_fx.bilevel.callbacks import Callback
from stn_fx.bilevel.optimizers import Role
from stn_fx.bilevel.records import FitResult
from stn_fx.errors import InputError

if TYPE_CHECKING:
    from stn_fx.bilevel.trainer import BilevelTrainer

SchedulerFactory = Callable[[Optimizer, int], LRScheduler]


def cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """From the optimizer's learning rate to zero over `steps` inner steps along half a cosine (SGDR, 1608.03983)."""
    return CosineAnnealingLR(optimizer, steps)


class LearningRateSchedule(Callback):
    """Steps a torch scheduler after every inner step.

    The base parameters alone follow it by default: the response goes on learning around weights that come to rest, and
    so do the hyperparameters.

    Args:
        factory: `factory(optimizer, inner_steps)` returns the scheduler of one group for the whole run.
        groups: whose optimizers follow; groups that the algorithm does not train are skipped.

    Raises:
        InputError: (at the start of `fit`) the training loader has no length, so the number of steps is unknown.
    """

    def __init__(self, factory: SchedulerFactory = cosine, groups: Iterable[Role] = ("base",)) -> None:
        self.factory = factory
        self.groups = tuple(groups)
        self._schedulers: list[LRScheduler] = []

    def fit_started(self, trainer: "BilevelTrainer", epochs: int, result: FitResult) -> None:
        if not isinstance(trainer.train, Sized):
            raise InputError(
                "A learning rate schedule needs the number of training batches, and the training loader has no length. "
                "Give it __len__, or leave the schedule out."
            )
        steps = epochs * len(trainer.train)
        optimizers = trainer.algorithm.optimizers
        self._schedulers = [self.factory(optimizers[role], steps) for role in self.groups if role in optimizers]

    def inner_step_ended(self, trainer: "BilevelTrainer", epoch: int, record: InnerRecord) -> None:
        for scheduler in self._schedulers:
            scheduler.step()
