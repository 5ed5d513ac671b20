"""Loss and accuracy of the model as it stands, on a whole loader."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stn_fx.bilevel.algorithm import device_of, evaluation_mode
from stn_fx.bilevel.batch import batch_size, split
from stn_fx.bilevel.objective import Loss, Objective, as_objective
from stn_fx.bilevel.replicas import Replicas
from stn_fx.bilevel.updates import named_values
from stn_fx.errors import InputError

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule


@dataclass(frozen=True)
class Evaluation:
    """Mean over a data set.

    Attributes:
        loss: mean validation loss per example.
        accuracy: share in [0, 1] of examples whose highest score is at the target; None where outputs are not scores
            (B, C) with class indices (B,) as targets.
        examples: how many there were.
    """

    loss: float
    accuracy: float | None
    examples: int


@torch.no_grad()
def evaluate(stn: "SelfTuningModule", loss: Loss | Objective, loader: Iterable[Any]) -> Evaluation:
    """Evaluate the user's module in evaluation mode; all modes are as before afterwards.

    Args:
        stn: the wrapped model.
        loss: `loss(output, target)` or an `Objective`, whose validation part counts. A mean is weighted by batch size.
        loader: batches as for training.

    Raises:
        InputError: the loader is empty, or batch or loss has not the form that `Objective` describes.
    """
    objective = as_objective(loss)
    device = device_of(stn)
    total, correct, examples, classified = 0.0, 0, 0, 0
    with evaluation_mode(stn):
        for content in loader:
            batch = objective.batch(content, device)
            size = batch_size(stn, batch)
            output = batch.feed(stn)
            hyperparameters = named_values(stn, stn.hparams.raw.expand(size, -1))
            total += size * objective.validation_loss(output, batch, hyperparameters).item()
            examples += size
            hits = _hits(output, batch.content)
            if hits is not None:
                correct += hits
                classified += size
    # Where several processes share the data set, each has evaluated its own part of it.
    sums = Replicas().sums([total, correct, examples, classified], device)
    total, correct, examples, classified = sums[0], *map(int, sums[1:])
    if not examples:
        raise InputError("The loader to evaluate on is empty. Give it at least one batch (mind drop_last=True).")
    return Evaluation(total / examples, correct / examples if classified == examples else None, examples)


def _hits(output: Any, content: Any) -> int | None:
    """How many examples are classified right; None where this is no classification."""
    try:
        target = split(content)[1]
    except InputError:
        return None
    if not isinstance(output, Tensor) or not isinstance(target, Tensor) or output.ndim != 2:
        return None
    if target.is_floating_point() or target.shape != output.shape[:1] or output.shape[1] < 2:
        return None
    return int((output.argmax(1) == target).sum())
