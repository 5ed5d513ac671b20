"""From a loss to a step of the optimizers: accumulated, clipped, and only if everything is finite."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stn_fx.arguments import require_count
from stn_fx.bilevel.decay import Decay
from stn_fx.bilevel.replicas import Replicas
from stn_fx.errors import DivergedError, InputError


@dataclass(frozen=True)
class UpdateOptions:
    """How losses become steps, the same for every algorithm.

    Attributes:
        accumulate: inner steps whose gradients (of base and response) are averaged into one update; T_train counts
            updates. Outer steps are not accumulated: their batch is that of the validation loader.
        clip_norm: greatest norm of the gradient of all base parameters, and of all response parameters; None = any.
        autocast: dtype that the passes run in where torch.autocast lowers it (torch.bfloat16); None = as the model is.
        skip_limit: updates of one group in a row that may be skipped because loss or gradient is not finite; one more
            is an error.

    Raises:
        InputError: an option is out of range.
    """

    accumulate: int = 1
    clip_norm: float | None = None
    autocast: torch.dtype | None = None
    skip_limit: int = 10

    def __post_init__(self) -> None:
        require_count("accumulate", self.accumulate)
        require_count("skip_limit", self.skip_limit, 0)
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"clip_norm={self.clip_norm}: it must be positive, or None for no clipping.")
        if self.autocast not in (None, torch.bfloat16):
            raise InputError(
                f"autocast={self.autocast}: only torch.bfloat16 is supported. float16 needs its loss scaled, and the "
                f"tangents of the linearized pass leave its range."
            )

    def precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context that a pass and its loss are computed in."""
        return nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast)


@dataclass(frozen=True)
class Outcome:
    """What became of one loss.

    Attributes:
        loss: its value.
        skipped: why the update was not applied; None where it was (or waits for the losses that are averaged in it).
        unusable: whether this loss, or the gradient of its update, was not finite.
    """

    loss: float
    skipped: str | None = None
    unusable: bool = False


class Updater:
    """Steps of one group of parameters.

    Args:
        optimizers: over the group's parameters.
        group: name for errors.
        accumulate: losses to average into one step.
        clip_norm: see `UpdateOptions`.
        skip_limit: see `UpdateOptions`.
        replicas: the processes that the gradients are averaged over.

    Attributes:
        skipped_in_a_row: losses that were not applied since the last one that was.
    """

    def __init__(
        self,
        optimizers: list[Optimizer],
        group: str,
        accumulate: int = 1,
        clip_norm: float | None = None,
        skip_limit: int = 10,
        replicas: Replicas | None = None,
    ) -> None:
        self.optimizers = optimizers
        self.group = group
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.skip_limit = skip_limit
        self.replicas = replicas or Replicas()
        self.skipped_in_a_row = 0
        self._gathered = 0
        self._spoilt: str | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything that the optimizers move."""
        return [p for optimizer in self.optimizers for each in optimizer.param_groups for p in each["params"]]

    def apply(
        self,
        loss: Tensor | Sequence[Callable[[], Tensor]],
        what: str,
        share: float = 1.0,
        decay: Decay | None = None,
    ) -> Outcome:
        """Add the gradient of a loss; step when enough are gathered and all were finite.

        Args:
            loss: scalar; or functions that compute one each, whose mean counts. Each is differentiated before the next
                is called, so that they need the memory of one.
            what: its name, for errors.
            share: weight of this process, see `Rows.share`.
            decay: weight decay, which counts as part of the loss.

        Raises:
            InputError: the loss depends on nothing that is trained.
            DivergedError: more losses in a row than `skip_limit` were not finite, or had a gradient that was not.
        """
        if self._gathered == 0:
            self._forget()
        losses = [lambda: loss] if isinstance(loss, Tensor) else loss
        factor = share / self.accumulate
        value = 0.0
        for compute in losses:
            value += self._differentiate(compute(), what, factor / len(losses), decay) / len(losses)
            if not math.isfinite(value):
                break
        unusable = float(not math.isfinite(value))
        if self.replicas.count > 1:
            total, unusable = self.replicas.sums([share * value, unusable], self.parameters[0].device)
            value = total / self.replicas.count
        reason = None
        if unusable:
            reason = f"the {what} is {value}"
        elif decay is not None:
            decay.add_gradient(factor, self.parameters)
        self._gathered += 1
        self._spoilt = self._spoilt or reason
        skipped = self._step(what, value) if self._gathered == self.accumulate else None
        return Outcome(value, skipped, unusable=bool(reason or skipped))

    def _differentiate(self, loss: Tensor, what: str, factor: float, decay: Decay | None) -> float:
        """Add the gradient of one loss where it is finite with the decay; the value of both, read in one go."""
        if not loss.requires_grad:
            raise InputError(
                f"The {what} does not depend on the model's output in a differentiable way (detached, converted, or "
                f"made of integers?), so there is nothing to learn from. Compute it from the output with torch "
                f"operations."
            )
        value = (loss.detach() if decay is None else loss.detach() + decay.value).item()
        if math.isfinite(value):
            (loss * factor).backward(inputs=self.parameters)
        return value

    def _step(self, what: str, value: float) -> str | None:
        """Step if what was gathered is finite, else tell why not; begin to gather anew."""
        reason = self._spoilt
        if reason is None:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            self.replicas.average(gradients)
            norm = torch.nn.utils.get_total_norm(gradients)
            if not torch.isfinite(norm):
                reason = f"the gradient of the {what} is not finite (the loss is {value:g})"
        self._gathered, self._spoilt = 0, None
        if reason is None:
            if self.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
            for optimizer in self.optimizers:
                optimizer.step()
            self.skipped_in_a_row = 0
            return None
        self._forget()
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.skip_limit:
            raise DivergedError(
                f"{reason[0].upper()}{reason[1:]}; the update was not applied, and {self.skipped_in_a_row} in a row "
                f"were not. Lower the learning rate of the {self.group} optimizer, clip its gradients (clip_norm), or "
                f"look for inputs that are not finite."
            )
        return reason

    def begin(self) -> None:
        """Gather anew: what waits for further losses is dropped."""
        self._gathered, self._spoilt = 0, None

    def _forget(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors: the optimizers, the counters, and gradients that wait for others."""
        waiting = [p.grad for p in self.parameters] if self._gathered else []
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "skipped_in_a_row": self.skipped_in_a_row,
            "gathered": self._gathered,
            "spoilt": self._spoilt,
            "gradients": waiting,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for optimizer, theirs in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(theirs)
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self._gathered, self._spoilt = state["gathered"], state["spoilt"]
        for parameter, gradient in zip(self.parameters, state["gradients"], strict=False):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
