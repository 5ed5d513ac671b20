"""Terms of the training loss that the updates add: norms of the responded weights and of activations, and entropies.

Each has an own coefficient for every example. Norms come from the structure of the response (`squared_norm`), never
from per-example weights. Shape suffixes: B examples, H hyperparameters.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stn_fx.bilevel.batch import Batch, split
from stn_fx.compiler.activation_sites import activation_terms
from stn_fx.errors import InputError
from stn_fx.hparams import Entry
from stn_fx.hparams.weight_groups import weight_groups
from stn_fx.rules.activation_terms import TERMS

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule


def penalties(
    stn: "SelfTuningModule",
    output: Any,
    values: Mapping[str, Tensor],
    raw_BH: Tensor | None = None,
    batch: Batch | None = None,
    activations: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Means over the examples of all terms that the hyperparameters ask for; `Decay` and `other_penalties` in one.

    Args:
        stn: the wrapped model.
        output: of the base pass, of the linearized pass (primal + tangent), or of the perturbed network.
        values: constrained values (B,) by name.
        raw_BH: the raw values of a perturbed pass; None in the base pass, whose weights are the same for all.
        batch: for terms of the user's own, which see the target.
        activations: what `stn.watching()` collected in that pass.
    """
    with torch.autocast(stn.hparams.raw.device.type, enabled=False):
        decays = penalized_groups(stn, "weight_decay").items()
        terms = [0.5 * (values[n] * stn.squared_norm(raw_BH, names)).mean() for n, names in decays]
    return terms + other_penalties(stn, output, values, raw_BH, batch, activations)


def other_penalties(
    stn: "SelfTuningModule",
    output: Any,
    values: Mapping[str, Tensor],
    raw_BH: Tensor | None = None,
    batch: Batch | None = None,
    activations: Sequence[Tensor] = (),
) -> list[Tensor]:
    """All terms but weight decay; arguments as for `penalties`."""
    with torch.autocast(stn.hparams.raw.device.type, enabled=False):
        lassos = penalized_groups(stn, "l1").items()
        terms = [(values[n] * stn.absolute_norm(raw_BH, names)).mean() for n, names in lassos]
        on_activations = activation_terms(stn.compiled.plan.sites)
        for (entry, name), activation in zip(on_activations, activations, strict=True):
            terms.append((values[name] * TERMS[entry](activation.to(values[name].dtype))).mean())
    if "confidence_penalty" in values:
        terms.append(-(values["confidence_penalty"] * entropy(output)).mean())
    own = [each.entry for each in stn.selections if each.entry.kind == "loss" and each.entry.apply is not None]
    return terms + [_own_term(entry, output, batch, values[entry.name]) for entry in own]


def _own_term(entry: Entry, output: Any, batch: Batch | None, value_B: Tensor) -> Tensor:
    assert entry.apply is not None
    assert batch is not None
    term = entry.apply(output, split(batch.content)[1], value_B[0] if entry.per_batch else value_B)
    if not isinstance(term, Tensor) or term.shape not in ((), value_B.shape):
        got = f"shape {tuple(term.shape)}" if isinstance(term, Tensor) else f"a {type(term).__name__}"
        raise InputError(
            f"{entry.name}: its term of the loss is {got} for {len(value_B)} examples. Return one term for each, (B,), "
            f"or their mean, ()."
        )
    return term.mean()


def entropy(output: Any) -> Tensor:
    """Entropy (B,) in nats of the predicted classes, from scores (B, C, ...); the mean over further axes.

    Raises:
        InputError: the output is no tensor of scores.
    """
    if not isinstance(output, Tensor) or output.ndim < 2:
        raise InputError(
            "confidence_penalty needs scores (B, C, ...) as the model's output. Leave it out, or write the term in "
            "loss=Objective(train=...), which sees its coefficient among the hyperparameters."
        )
    log_p = torch.log_softmax(output, dim=1)
    return -(log_p.exp() * log_p).sum(1).flatten(1).mean(1) if output.ndim > 2 else -(log_p.exp() * log_p).sum(1)


def penalized_groups(stn: "SelfTuningModule", entry: str) -> dict[str, list[str] | None]:
    """Names of the weights by hyperparameter; None = the usual ones, where no pattern divides them."""
    names = [each.name for each in stn.hparams.resolved if each.entry == entry]
    if names in ([], [entry]):
        return dict.fromkeys(names)
    weights = {name: p.ndim for name, p in stn.model.named_parameters() if p.requires_grad}
    return dict(weight_groups(names, weights))
