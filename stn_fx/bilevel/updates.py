"""The three updates of Delta-STN, each of one group of parameters by one pass.

Source: Bae & Grosse 2020 (Delta-STN, arXiv 2010.13514), algorithm 1 and section 3. With lambda the current
hyperparameters, eps_i the perturbation of example i, and DeltaW linear:

- base:      min over w0 of          mean_i L_train(f(x_i; w0), lambda)
- response:  min over DeltaW of      mean_i L_train(f(x_i; w0) + J_w f . DeltaW(eps_i), lambda + eps_i)
- outer:     min over lambda, scale  mean_i L_valid(f(x_i; w0 + DeltaW(lambda + eps_i - stop(lambda)))) - tau * entropy

Each applies nothing when its loss or its gradient is not finite, see `stn_fx.bilevel.apply`. Shape suffixes:
B examples, H hyperparameters.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from stn_fx.bilevel.apply import Outcome, Updater
from stn_fx.bilevel.batch import Batch, batch_size
from stn_fx.bilevel.decay import Decay
from stn_fx.bilevel.mixing import mix
from stn_fx.bilevel.objective import Objective
from stn_fx.bilevel.penalties import other_penalties
from stn_fx.errors import StnError

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule

Precision = AbstractContextManager[Any]
ResponseLoss = Callable[["SelfTuningModule", Objective, Batch, Tensor, Precision], Tensor]


def base_update(
    stn: "SelfTuningModule", objective: Objective, updater: Updater, batch: Batch, precision: Precision
) -> Outcome:
    """One update of the base parameters at the current hyperparameters.

    It alone updates the running statistics of batch norms; they are put back where the loss is not applied.
    """
    settle = buffers_of_an_update(stn, updater)
    raw_BH = stn.hparams.raw.detach().expand(batch_size(stn, batch), -1)
    hyperparameters = named_values(stn, raw_BH)
    with precision, stn.watching() as activations:
        mixed = mix(stn, batch, hyperparameters)
        output = mixed.batch.feed(stn)
        batch = mixed.with_targets(output)
        loss = objective.training_loss(output, batch, hyperparameters)
        loss = sum(other_penalties(stn, output, hyperparameters, None, batch, activations), loss)
    decay = Decay(stn, hyperparameters)
    return settle(updater.apply(loss, "training loss of the base pass", batch.rows.share, decay))


def buffers_of_an_update(stn: "SelfTuningModule", updater: Updater) -> Callable[[Outcome], Outcome]:
    """Called before a pass that moves running statistics; to be called with what became of its update.

    Where the loss was not finite the statistics are put back, else every process gets those of the first one: each has
    seen other examples.
    """
    buffers = [(buffer, buffer.clone()) for buffer in stn.model.buffers()]

    def settle(outcome: Outcome) -> Outcome:
        if outcome.unusable:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
        updater.replicas.broadcast(stn.model.buffers())
        return outcome

    return settle


def response_update(
    stn: "SelfTuningModule",
    objective: Objective,
    updater: Updater,
    batch: Batch,
    raws: Sequence[Tensor],
    precision: Precision,
    response_loss: ResponseLoss | None = None,
) -> Outcome:
    """One update of the response parameters, by the mean of the losses at perturbed hyperparameters.

    Args:
        raws: perturbed raw hyperparameters (B, H) of every example, detached; one pass for each.
        response_loss: of one pass; `linearized_response_loss` where None.
    """
    response_loss = response_loss or linearized_response_loss
    raw_BH = torch.cat(list(raws))
    decay = Decay(stn, named_values(stn, raw_BH), raw_BH)
    losses = [partial(response_loss, stn, objective, batch, raw, precision) for raw in raws]
    return updater.apply(losses, "training loss of the response", batch.rows.share, decay)


def linearized_response_loss(
    stn: "SelfTuningModule", objective: Objective, batch: Batch, raw_BH: Tensor, precision: Precision
) -> Tensor:
    """What the response minimizes: training loss of the linearized model, with all penalties but weight decay."""
    hyperparameters = named_values(stn, raw_BH)
    with precision, stn.watching() as activations:
        output, batch = _linearized(stn, batch, raw_BH)
        loss = objective.training_loss(output, batch, hyperparameters)
        return sum(other_penalties(stn, output, hyperparameters, raw_BH, batch, activations), loss)


def perturbed_response_loss(
    stn: "SelfTuningModule", objective: Objective, batch: Batch, raw_BH: Tensor, precision: Precision
) -> Tensor:
    """As `linearized_response_loss`, but of the perturbed network itself instead of its linearization."""
    hyperparameters = named_values(stn, raw_BH)
    with precision, stn.watching() as activations:
        mixed = mix(stn, batch, hyperparameters)
        output = mixed.batch.feed(stn.respond_in_training, raw=raw_BH)
        batch = mixed.with_targets(output)
        loss = objective.training_loss(output, batch, hyperparameters)
        return sum(other_penalties(stn, output, hyperparameters, raw_BH, batch, activations), loss)


def linearized_loss(stn: "SelfTuningModule", objective: Objective, batch: Batch, raw_BH: Tensor) -> Tensor:
    """Training loss of the linearized model, without penalties."""
    output, batch = _linearized(stn, batch, raw_BH)
    return objective.training_loss(output, batch, named_values(stn, raw_BH))


def _linearized(stn: "SelfTuningModule", batch: Batch, raw_BH: Tensor) -> tuple[Any, Batch]:
    """Output of the linearized model, and the batch as the hyperparameters mix it."""
    mixed = mix(stn, batch, named_values(stn, raw_BH))
    primal, tangent = mixed.batch.feed(stn.linearize, raw=raw_BH)
    if any(leaf.requires_grad for leaf in _tensors(primal)):
        # Backward through the jvp of norms is silently wrong then (pytorch issues 196699 and 196700).
        raise StnError(
            "The primal of the linearized pass requires a gradient, which makes gradients of the response wrong. Base "
            "parameters must enter detached: if `linearize` is your own, detach them; else this is a bug of stn_fx."
        )
    output = sum_of_primal_and_tangent(primal, tangent)
    return output, mixed.with_targets(output)


def validation_loss_of_response(stn: "SelfTuningModule", objective: Objective, batch: Batch) -> Tensor:
    """Validation loss of the response pass at the current hyperparameters."""
    raw_BH = stn.hparams.raw.detach().expand(batch_size(stn, batch), -1)
    return objective.validation_loss(batch.feed(stn.respond, raw=raw_BH), batch, named_values(stn, raw_BH))


def validation_loss(stn: "SelfTuningModule", objective: Objective, batch: Batch) -> Tensor:
    """Validation loss of the model as it stands, in its mode; differentiable in the base parameters."""
    raw_BH = stn.hparams.raw.detach().expand(batch_size(stn, batch), -1)
    return objective.validation_loss(batch.feed(stn), batch, named_values(stn, raw_BH))


def hyper_update(
    stn: "SelfTuningModule",
    objective: Objective,
    updater: Updater,
    batch: Batch,
    raw_BH: Tensor,
    entropy_weight: float,
    precision: Precision,
) -> Outcome:
    """One update of raw hyperparameters and scales; the outcome's loss is without the entropy term.

    Args:
        raw_BH: perturbed raw hyperparameters of every example, differentiable in raw values and scales.
        entropy_weight: tau, the reward for wide perturbations (nats); without it the scales would collapse.
    """
    with precision:
        output = batch.feed(stn.respond_with_statistics, raw=raw_BH)
        # Detached: a validation objective that looks at the hyperparameters must not be improved through them directly.
        valid_loss = objective.validation_loss(output, batch, named_values(stn, raw_BH.detach()))
    reward = entropy_weight * stn.hparams.entropy()
    outcome = updater.apply(valid_loss - reward, "validation loss of the response pass", batch.rows.share)
    return replace(outcome, loss=outcome.loss + reward.item())


def named_values(stn: "SelfTuningModule", raw_BH: Tensor) -> dict[str, Tensor]:
    """Constrained values (B,) by name."""
    return dict(zip(stn.hparams.names, stn.hparams.constrain(raw_BH).unbind(-1), strict=True))


def sum_of_primal_and_tangent(primal: Any, tangent: Any) -> Any:
    """Detached primal + tangent, leaf by leaf; leaves that cannot have a tangent (integers, None) stay."""

    def add(p: Any, t: Any) -> Any:
        return p.detach() + t if isinstance(p, Tensor) and isinstance(t, Tensor) and p.is_floating_point() else p

    return tree_map(add, primal, tangent)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
