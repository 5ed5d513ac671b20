"""The three updates of Delta-STN, each of one group of parameters by one pass.

Source: Bae & Grosse 2020 (Delta-STN, arXiv 2010.13514), algorithm 1 and section 3. With lambda the current
hyperparameters, eps_i the perturbation of example i, and DeltaW linear:

- base:      min over w0 of          mean_i L_train(f(x_i; w0), lambda)
- response:  min over DeltaW of      mean_i L_train(f(x_i; w0) + J_w f . DeltaW(eps_i), lambda + eps_i)
- outer:     min over lambda, scale  mean_i L_valid(f(x_i; w0 + DeltaW(lambda + eps_i - stop(lambda)))) - tau * entropy

Each applies nothing when its loss or its gradient is not finite. Shape suffixes: B examples, H hyperparameters.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from stn_fx.bilevel.batch import Batch
from stn_fx.bilevel.mixing import mix
from stn_fx.bilevel.objective import Objective
from stn_fx.bilevel.penalties import penalties
from stn_fx.errors import DivergedError, InputError, StnError

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule


def base_update(stn: "SelfTuningModule", objective: Objective, optimizer: Optimizer, batch: Batch) -> float:
    """One update of the base parameters at the current hyperparameters; returns the training loss.

    It alone updates the running statistics of batch norms.
    """
    raw_BH = stn.hparams.raw.detach().expand(batch_size(stn, batch), -1)
    hyperparameters = named_values(stn, raw_BH)
    mixed = mix(stn, batch, hyperparameters)
    output = mixed.batch.feed(stn)
    batch = mixed.with_targets(output)
    loss = objective.training_loss(output, batch, hyperparameters)
    loss = sum(penalties(stn, output, hyperparameters, batch=batch), loss)
    return apply_update(loss, optimizer, "training loss of the base pass", "base")


def response_update(stn: "SelfTuningModule", objective: Objective, optimizer: Optimizer, batch: Batch) -> float:
    """One update of the response parameters with fresh perturbations; returns the loss of the linearized model."""
    raw_BH = stn.hparams.sample(batch_size(stn, batch), generator=stn.generator()).detach()
    hyperparameters = named_values(stn, raw_BH)
    mixed = mix(stn, batch, hyperparameters)
    primal, tangent = mixed.batch.feed(stn.linearize, raw=raw_BH)
    if any(leaf.requires_grad for leaf in _tensors(primal)):
        # Backward through the jvp of norms is silently wrong then (pytorch issues 196699 and 196700).
        raise StnError(
            "The primal of the linearized pass requires a gradient, which makes gradients of the response wrong. Base "
            "parameters must enter detached: if `linearize` is your own, detach them; else this is a bug of stn_fx."
        )
    output = _plus(primal, tangent)
    batch = mixed.with_targets(output)
    loss = objective.training_loss(output, batch, hyperparameters)
    loss = sum(penalties(stn, output, hyperparameters, raw_BH, batch), loss)
    return apply_update(loss, optimizer, "training loss of the linearized pass", "response")


def hyper_update(
    stn: "SelfTuningModule", objective: Objective, optimizers: list[Optimizer], batch: Batch, entropy_weight: float
) -> float:
    """One update of raw hyperparameters and scales; returns the validation loss, without the entropy term.

    Args:
        entropy_weight: tau, the reward for wide perturbations (nats); without it the scales would collapse.
    """
    raw_BH = stn.hparams.sample(batch_size(stn, batch), generator=stn.generator())
    output = batch.feed(stn.respond, raw=raw_BH)
    # Detached: a validation objective that looks at the hyperparameters must not be improved through them directly.
    valid_loss = objective.validation_loss(output, batch, named_values(stn, raw_BH.detach()))
    loss = valid_loss - entropy_weight * stn.hparams.entropy()
    apply_update(loss, optimizers, "validation loss of the response pass", "hyper and scale")
    return valid_loss.item()


def batch_size(stn: "SelfTuningModule", batch: Batch) -> int:
    """Number of examples: the length of the batch axis of the first input that has one."""
    inputs = batch.feed(lambda *args, **kwargs: tree_leaves((args, kwargs)))
    axes = stn.compiled.captured.batch_axes
    return next(int(x.shape[axis]) for x, axis in zip(inputs, axes, strict=True) if axis is not None)


def named_values(stn: "SelfTuningModule", raw_BH: Tensor) -> dict[str, Tensor]:
    """Constrained values (B,) by name."""
    return dict(zip(stn.hparams.names, stn.hparams.constrain(raw_BH).unbind(-1), strict=True))


def apply_update(loss: Tensor, optimizers: Optimizer | list[Optimizer], what: str, group: str) -> float:
    """Gradient of the loss for the optimizers' own parameters only, then one step of each, if all is finite.

    Raises:
        DivergedError: the loss or a gradient is not finite; nothing is applied then.
    """
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else optimizers
    if not loss.requires_grad:
        raise InputError(
            f"The {what} does not depend on the model's output in a differentiable way (detached, converted, or made "
            f"of integers?), so there is nothing to learn from. Compute it from the output with torch operations."
        )
    value = loss.item()
    if not math.isfinite(value):
        raise _diverged(f"The {what} is {value}", group)
    parameters = [p for optimizer in optimizers for each in optimizer.param_groups for p in each["params"]]
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        raise _diverged(f"The gradient of the {what} is not finite (the loss is {value:g})", group)
    for optimizer in optimizers:
        optimizer.step()
    return value


def _diverged(what: str, group: str) -> DivergedError:
    return DivergedError(
        f"{what}; the update was not applied. Lower the learning rate of the {group} optimizer, or look for inputs "
        f"that are not finite in this batch."
    )


def _plus(primal: Any, tangent: Any) -> Any:
    """Primal + tangent, leaf by leaf; leaves that cannot have a tangent (integers, None) stay."""

    def add(p: Any, t: Any) -> Any:
        return p + t if isinstance(p, Tensor) and isinstance(t, Tensor) and p.is_floating_point() else p

    return tree_map(add, primal, tangent)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
