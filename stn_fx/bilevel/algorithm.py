"""What every tuning algorithm shares: the wrapped model, the objective, and optimizers checked before training."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from stn_fx.bilevel.batch import Batch
from stn_fx.bilevel.objective import Loss, Objective, as_objective
from stn_fx.bilevel.optimizers import OptimizerChoice, Role, resolve_optimizer
from stn_fx.errors import StnError

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule


@dataclass(frozen=True)
class InnerRecord:
    """Losses of one inner step, before its updates.

    Attributes:
        loss: training loss of the base pass, with weight decay where it is tuned.
        response_loss: training loss of the linearized pass; None where there was none.
    """

    loss: float
    response_loss: float | None = None


@dataclass(frozen=True)
class OuterRecord:
    """Validation loss of one outer step at perturbed hyperparameters, without the entropy term, before its update."""

    loss: float


class Algorithm(ABC):
    """Inner and outer steps over one wrapped model; a trainer calls nothing else.

    Args:
        stn: the wrapped model.
        loss: `loss(output, target)` or an `Objective`.
        choices: the optimizers that this algorithm uses, by group; None for a default.

    Raises:
        InputError: an optimizer does not fit its group. Known here where the model is captured already, else at the
            first step.

    Attributes:
        tunes: whether outer steps move the hyperparameters.
        optimizers: by group; empty until the model is captured.
    """

    tunes: bool

    def __init__(
        self, stn: "SelfTuningModule", loss: Loss | Objective, choices: Mapping[Role, OptimizerChoice]
    ) -> None:
        self.stn = stn
        self.objective = as_objective(loss)
        self.optimizers: dict[Role, Optimizer] = {}
        self._choices = choices
        if is_captured(stn):
            self._build_optimizers()

    @abstractmethod
    def inner_step(self, content: Any) -> InnerRecord:
        """Update weights by one training batch, as the loader yields it.

        Raises:
            InputError: batch or loss has not the form that `Objective` describes.
            DivergedError: a loss or a gradient is not finite; that update is not applied.
        """

    @abstractmethod
    def outer_step(self, content: Any) -> OuterRecord:
        """Update hyperparameters by one validation batch; raises as `inner_step` does."""

    def prepare(self, content: Any) -> Batch:
        """The batch on the model's device; the first one also captures the model and builds the optimizers."""
        batch = self.objective.batch(content, device_of(self.stn))
        if not is_captured(self.stn):
            self.stn.compile_for(batch.inputs)
        if not self.optimizers:
            self._build_optimizers()
        return batch

    def _build_optimizers(self) -> None:
        hparams = self.stn.hparams
        parameters: dict[Role, list[nn.Parameter]] = {
            "base": list(self.stn.base_parameters()),
            "response": list(self.stn.response_parameters()),
            "hyper": [hparams.raw],
            "scale": [hparams.raw_scale],
        }
        decay_is_tuned = any(each.entry == "weight_decay" for each in hparams.resolved)
        self.optimizers = {
            role: resolve_optimizer(choice, role, parameters[role], decay_is_tuned)
            for role, choice in self._choices.items()
        }


def is_captured(stn: "SelfTuningModule") -> bool:
    """Whether hyperparameters and response exist already, or wait for the first batch."""
    try:
        return bool(stn.compiled)
    except StnError:
        return False


def device_of(stn: "SelfTuningModule") -> torch.device:
    """Where the model's parameters are."""
    return next(iter(stn.model.parameters())).device


@contextmanager
def training_mode(module: nn.Module) -> Iterator[None]:
    """Training mode for the duration, all flags as before afterwards.

    A module that is in training mode keeps the flags of its submodules: frozen batch norms stay frozen.
    """
    if module.training:
        yield
        return
    with _flags_restored(module):
        module.train()
        yield


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the duration, the flags of all submodules as before afterwards."""
    with _flags_restored(module):
        module.eval()
        yield


@contextmanager
def _flags_restored(module: nn.Module) -> Iterator[None]:
    flags = [(each, each.training) for each in module.modules()]
    try:
        yield
    finally:
        for each, training in flags:
            each.training = training
