"""What is minimised: the training and the validation objective as functions of output, batch and hyperparameters.

A plain loss becomes an `Objective` by `supervised`. Whoever needs more (dict outputs, sequence models, mixing of
targets, another objective for validation) writes an `Objective`. Weight decay is added by the updates, because it needs
the response.

A mean over the batch is as good as per-example losses here: hyperparameters enter the loss of an example through its
output, its target and additive terms, so mean_i(loss_i) has all the gradients that are needed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stn_fx.bilevel.batch import Batch, Inputs, split, to_device
from stn_fx.bilevel.label_smoothing import require_soft_targets, soft_targets
from stn_fx.errors import InputError

Loss = Callable[[Any, Any], Tensor]
Term = Callable[[Any, Any, Mapping[str, Tensor]], Tensor]


def _default_inputs(content: Any) -> Inputs:
    return split(content)[0]


@dataclass(frozen=True)
class Objective:
    """The general form of what is minimised.

    Attributes:
        train: `(output, batch, hyperparameters) -> loss`, for base and linearized pass. `batch` is what the loader
            yielded, on the device; `hyperparameters` maps each name to constrained values (B,), one per example.
            Returns losses (B,) or their mean (a scalar).
        valid: the same for validation; `train` where None. It should not depend on the hyperparameters: those of the
            validation loss would be driven to wherever they make it small.
        inputs: what of a batch the model takes, one tensor, a tuple of positional or a dict of keyword inputs; where
            None, by the rule of `stn_fx.bilevel.batch`.
    """

    train: Term
    valid: Term | None = None
    inputs: Callable[[Any], Inputs] | None = None

    def batch(self, content: Any, device: torch.device) -> Batch:
        """The loader's batch on the device, with its inputs; InputError where it cannot be split."""
        content = to_device(content, device)
        inputs = (self.inputs or _default_inputs)(content)
        if isinstance(inputs, Tensor):
            inputs = (inputs,)
        return Batch(content, inputs if isinstance(inputs, dict) else tuple(inputs))

    def training_loss(self, output: Any, batch: Batch, hyperparameters: Mapping[str, Tensor]) -> Tensor:
        """Mean training loss (scalar); InputError where the objective returns anything else."""
        return _mean(self.train(output, batch.content, hyperparameters), hyperparameters)

    def validation_loss(self, output: Any, batch: Batch, hyperparameters: Mapping[str, Tensor]) -> Tensor:
        """Mean validation loss (scalar); InputError where the objective returns anything else."""
        return _mean((self.valid or self.train)(output, batch.content, hyperparameters), hyperparameters)


def supervised(loss: Loss) -> Objective:
    """Objective of a plain `loss(output, target)`, with label smoothing where that hyperparameter exists.

    Args:
        loss: returns losses (B,) or their mean, as the losses of `torch.nn.functional` do.
    """
    probed = False

    def train(output: Any, content: Any, hyperparameters: Mapping[str, Tensor]) -> Tensor:
        nonlocal probed
        target = split(content)[1]
        smoothing_B = hyperparameters.get("label_smoothing")
        if smoothing_B is None:
            return loss(output, target)
        smoothed = soft_targets(output, target, smoothing_B)
        if not probed:
            require_soft_targets(loss, output, target)
            probed = True
        return loss(output, smoothed)

    def valid(output: Any, content: Any, hyperparameters: Mapping[str, Tensor]) -> Tensor:
        return loss(output, split(content)[1])

    return Objective(train=train, valid=valid)


def as_objective(loss: Loss | Objective) -> Objective:
    """An `Objective` as it is, a plain loss made one."""
    if isinstance(loss, Objective):
        return loss
    if not callable(loss):
        raise InputError(
            f"loss is a {type(loss).__name__}; pass a function of (output, target), such as "
            f"torch.nn.functional.cross_entropy, or an Objective."
        )
    return supervised(loss)


def _mean(loss: Any, hyperparameters: Mapping[str, Tensor]) -> Tensor:
    """Mean of per-example losses or the mean itself; anything else would be averaged over wrong axes silently."""
    size = next((values_B.shape[0] for values_B in hyperparameters.values()), None)
    if not isinstance(loss, Tensor):
        raise InputError(f"The loss returned a {type(loss).__name__}, not a tensor of shape () or (B,).")
    if not loss.is_floating_point():
        raise InputError(
            f"The loss is of {str(loss.dtype).removeprefix('torch.')}, as of classes or comparisons, so it does not "
            f"depend on the model's output in a differentiable way. Compute it from the output with torch operations."
        )
    if loss.ndim == 0 or (loss.ndim == 1 and size in (None, loss.shape[0])):
        return loss.mean()
    raise InputError(
        f"The loss returned shape {tuple(loss.shape)} for {size} examples. It must return their mean, shape (), or one "
        f"loss for each, shape (B,): average over the other axes in the loss."
    )
