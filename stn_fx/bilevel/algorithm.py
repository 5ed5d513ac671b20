"""What every tuning algorithm shares: the wrapped model, the objective, and optimizers checked before training."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from stn_fx.arguments import described
from stn_fx.bilevel.apply import Outcome, UpdateOptions, Updater
from stn_fx.bilevel.batch import Batch, batch_size
from stn_fx.bilevel.objective import Loss, Objective, as_objective
from stn_fx.bilevel.optimizers import OptimizerChoice, Role, require_parameters, resolve_optimizer
from stn_fx.bilevel.replicas import Replicas
from stn_fx.errors import InputError, StnError

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule

INNER: tuple[Role, ...] = ("base", "response")
OUTER: tuple[Role, ...] = ("hyper", "scale")

# Added to the seed of the masks, so that no two streams of random numbers are the same.
PERTURBATIONS, RESPONSE_MASKS = 1, 2
PER_RANK = 1_000_003


@dataclass(frozen=True)
class InnerRecord:
    """Losses of one inner step, before its updates.

    Attributes:
        loss: training loss of the base pass, with weight decay where it is tuned.
        response_loss: training loss of the linearized pass; None where there was none.
        skipped: why an update was not applied, for each that was not.
    """

    loss: float
    response_loss: float | None = None
    skipped: tuple[str, ...] = ()

    @staticmethod
    def of(base: Outcome, response: Outcome | None = None) -> "InnerRecord":
        """From the outcomes of the updates."""
        reasons = [each.skipped for each in (base, response) if each is not None and each.skipped]
        return InnerRecord(base.loss, None if response is None else response.loss, tuple(reasons))


@dataclass(frozen=True)
class OuterRecord:
    """One outer step.

    Attributes:
        loss: validation loss at perturbed hyperparameters, without the entropy term, before the update.
        skipped: why the update was not applied, where it was not.
    """

    loss: float
    skipped: tuple[str, ...] = ()

    @staticmethod
    def of(outcome: Outcome) -> "OuterRecord":
        """From the outcome of the update."""
        return OuterRecord(outcome.loss, (outcome.skipped,) if outcome.skipped else ())


class Algorithm(ABC):
    """Inner and outer steps over one wrapped model; a trainer calls nothing else.

    Args:
        stn: the wrapped model.
        loss: `loss(output, target)` or an `Objective`.
        choices: the optimizers that this algorithm uses, by group; None for a default.
        updates: accumulation, clipping, autocast, and what is done about losses that are not finite.

    Raises:
        InputError: the wrapped model is in a DistributedDataParallel; or it is in float16, or an optimizer does not fit
            its group, which is known here where the model is captured already, else at the first step.

    Attributes:
        tunes: whether outer steps move the hyperparameters.
        optimizers: by group; empty until the model is captured.
        replicas: the processes that train together.
        perturbations: generator of the perturbed hyperparameters; there once the model is captured.
        response_masks: generators of the masks by which the response learns. With masks of their own, learning it does
            not touch the training of the model: until the first outer step that is the same as without tuning.
        updaters: what steps them; those of hyperparameters and scales step together, under "hyper".
    """

    tunes: bool
    perturbations: torch.Generator
    response_masks: dict[str, torch.Generator]

    def __init__(
        self,
        stn: "SelfTuningModule",
        loss: Loss | Objective,
        choices: Mapping[Role, OptimizerChoice],
        updates: UpdateOptions | None = None,
    ) -> None:
        if isinstance(stn, DistributedDataParallel):
            raise InputError(
                "The wrapped model is in a DistributedDataParallel. Pass it as stn_fx.transform gave it: gradients are "
                "averaged over the processes in every update, and this wrapper sees none of the three passes."
            )
        self.stn = stn
        self.updates = updates or UpdateOptions()
        self.replicas = Replicas()
        self.objective = as_objective(loss)
        self._loss_name = _name(loss)
        self.optimizers: dict[Role, Optimizer] = {}
        self.updaters: dict[Role, Updater] = {}
        self._choices = choices
        if is_captured(stn):
            self._build_optimizers()

    @abstractmethod
    def inner_step(self, content: Any) -> InnerRecord:
        """Update weights by one training batch, as the loader yields it.

        Raises:
            InputError: batch or loss has not the form that `Objective` describes.
            DivergedError: too many updates in a row were skipped, because loss or gradient was not finite.
        """

    @abstractmethod
    def outer_step(self, content: Any) -> OuterRecord:
        """Update hyperparameters by one validation batch; raises as `inner_step` does."""

    def description(self) -> dict[str, Any]:
        """What a checkpoint of its runs must agree on, for people to read."""
        return {"class": type(self).__qualname__, "loss": self._loss_name, "updates": str(self.updates)}

    def begin(self) -> None:
        """Before a fit: forget gradients of batches that an earlier one left waiting for others."""
        for updater in self.updaters.values():
            updater.begin()

    def require_own_parameters(self) -> None:
        """InputError where an optimizer is not over the model's parameters any more, because one was replaced."""
        parameters = self._parameters_by_role()
        for role, optimizer in self.optimizers.items():
            require_parameters(optimizer, role, parameters[role])

    @property
    def healthy(self) -> bool:
        """Whether the last update of every group was applied."""
        return not any(updater.skipped_in_a_row for updater in self.updaters.values())

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the wrapped model, as tensors and plain data."""
        return {
            "updaters": {role: updater.state_dict() for role, updater in self.updaters.items()},
            "perturbations": self.perturbations.get_state(),
            "masks": [generator.get_state() for generator in self._masks()],
            "response_masks": [generator.get_state() for generator in self.response_masks.values()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; the model is captured."""
        for role, updater in self.updaters.items():
            updater.load_state_dict(state["updaters"][role])
        self.perturbations.set_state(state["perturbations"])
        for generator, its in zip(self._masks(), state["masks"], strict=True):
            generator.set_state(its)
        for generator, its in zip(self.response_masks.values(), state["response_masks"], strict=True):
            generator.set_state(its)

    def _masks(self) -> list[torch.Generator]:
        """Those of the model's own masks, on its device and on the CPU."""
        return [self.stn.generator(), self.stn.generator("cpu")]

    def precision(self) -> AbstractContextManager[Any]:
        """The context that a pass and its loss are computed in."""
        return self.updates.precision(device_of(self.stn))

    def prepare(self, content: Any) -> Batch:
        """The batch on the model's device; the first one also captures the model and builds the optimizers."""
        batch = self.objective.batch(content, device_of(self.stn))
        if not is_captured(self.stn):
            self.stn.compile_for(batch.inputs)
        if not self.optimizers:
            self._build_optimizers()
        elif self.perturbations.device.type != self.stn.generator().device.type:
            self._begin_randomness()  # the model has moved since
        rows = self.replicas.rows(batch_size(self.stn, batch), device_of(self.stn))
        return replace(batch, rows=rows)

    def _build_optimizers(self) -> None:
        if self.stn.hparams.raw.dtype == torch.float16:
            raise InputError(
                "The model's parameters are in float16, whose range and steps are too small for updates. Train it in "
                "float32, with UpdateOptions(autocast=torch.bfloat16) where it should be fast."
            )
        parameters = self._parameters_by_role()
        decay_is_tuned = any(each.entry == "weight_decay" for each in self.stn.hparams.resolved)
        self.optimizers = {
            role: resolve_optimizer(choice, role, parameters[role], decay_is_tuned)
            for role, choice in self._choices.items()
        }
        limit, replicas = self.updates.skip_limit, self.replicas
        for role in INNER:
            if role in self.optimizers:
                accumulate, clip_norm = self.updates.accumulate, self.updates.clip_norm
                self.updaters[role] = Updater([self.optimizers[role]], role, accumulate, clip_norm, limit, replicas)
        outer = [self.optimizers[role] for role in OUTER if role in self.optimizers]
        if outer:
            self.updaters["hyper"] = Updater(outer, "hyper and scale", skip_limit=limit, replicas=replicas)
        self._begin_randomness()

    def _parameters_by_role(self) -> dict[Role, list[nn.Parameter]]:
        hparams = self.stn.hparams
        return {
            "base": list(self.stn.base_parameters()),
            "response": list(self.stn.response_parameters()),
            "hyper": [hparams.raw],
            "scale": [hparams.raw_scale],
        }

    def _begin_randomness(self) -> None:
        """Perturbations from a generator of their own, the same in every process; masks differ between processes."""
        masks = self.stn.generator()
        seed = self.replicas.first(masks.initial_seed())  # processes are often seeded by their rank
        self.perturbations = torch.Generator(masks.device).manual_seed((seed + PERTURBATIONS) % 2**63)
        own = seed + PER_RANK * self.replicas.rank
        if self.replicas.rank:
            masks.manual_seed(own % 2**63)
        self.response_masks = {
            str(place): torch.Generator(place).manual_seed((own + RESPONSE_MASKS) % 2**63)
            for place in (masks.device, torch.device("cpu"))
        }
        self.replicas.broadcast([*self.stn.parameters(), *self.stn.model.buffers()])


def _name(loss: Any) -> str:
    """What tells two losses apart, without addresses in memory."""
    if isinstance(loss, Objective):
        return f"Objective({_name(loss.train)}, {_name(loss.valid) if loss.valid else 'the same'})"
    return described(loss)


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
