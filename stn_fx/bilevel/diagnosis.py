"""What a diverged run looked like, in words: where the first things are that are not finite, and how it was set."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from stn_fx.bilevel.algorithm import Algorithm

MAX_NAMES = 4


def diagnose(algorithm: "Algorithm", content: Any) -> str:
    """Sentences about the batch, the weights, the hyperparameters and the learning rates.

    Args:
        algorithm: whose updates were skipped.
        content: the last batch, as the loader yielded it.
    """
    stn = algorithm.stn
    inputs = [leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    bad_inputs = any(not leaf.isfinite().all() for leaf in inputs)
    bad_weights = _not_finite(stn.named_parameters())
    bad_buffers = _not_finite(stn.named_buffers())
    values = ", ".join(f"{name}={value:.3g}" for name, value in stn.hparams.values().items())
    rates = ", ".join(f"{role} {each.param_groups[0]['lr']:.3g}" for role, each in algorithm.optimizers.items())
    return "\n".join(
        [
            f"The last batch {'holds numbers that are not finite' if bad_inputs else 'is finite'}.",
            f"Weights that are not finite: {bad_weights}. Buffers: {bad_buffers}.",
            f"Hyperparameters: {values}.",
            f"Learning rates: {rates}.",
        ]
    )


def _not_finite(named: Iterable[tuple[str, Tensor]]) -> str:
    names = [name for name, tensor in named if not bool(tensor.isfinite().all())]
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more if names else "none"
