"""Measures `Trust` once in an epoch: two linearized passes without a backward, and one response pass.

The run itself does not notice: perturbations and masks come from generators that are made here from the seed and the
number of steps, nothing is written to any `.grad`, and the caller puts the global generators back.

Every example (with batch norms: every group of examples, as the response learns) perturbs one hyperparameter only, so
that one pass tells them apart; each is measured at a perturbation
and at its opposite with the same masks, which cancels the part of the loss's change that is odd in the perturbation
(the change of an example's loss by the response, whatever the hyperparameters): it is no part of the expectation, and
by far the most of the noise. Shape suffixes: B examples, H hyperparameters.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from stn_fx.bilevel.algorithm import Algorithm, device_of, training_mode
from stn_fx.bilevel.batch import Batch
from stn_fx.bilevel.mixing import mix
from stn_fx.bilevel.penalties import other_penalties, penalized_groups
from stn_fx.bilevel.trust import COLLAPSED, Trust, at_bound
from stn_fx.bilevel.updates import named_values
from stn_fx.hparams.constraint import constrain

if TYPE_CHECKING:
    from stn_fx.bilevel.steps import DeltaSTN
    from stn_fx.transform import SelfTuningModule

MEASUREMENT = 3
"""Added to the seed, as the streams in `stn_fx.bilevel.algorithm`."""
PER_STEP = 7919
FEWEST = 4
"""Examples of a group: the statistics of fewer say little of the batch."""

Measured = dict[str, dict[str, float | None]]
"""Fields of `Trust` by name of hyperparameter; plain data, so that a run that is saved half way has them."""


def measure(algorithm: Algorithm, training: Any, validation: Any, step: int) -> dict[str, Trust]:
    """Trust by name of hyperparameter.

    Args:
        algorithm: what trains; nothing of it is changed.
        training: a training batch, as the loader yields it; None = the response is not measured.
        validation: a validation batch; None = hypergradients are not measured.
        step: inner steps done, so that perturbations are fresh and a resumed run draws the same.
    """
    response = {} if training is None else measure_response(algorithm, training, step)
    gradients = {} if validation is None else measure_hypergradients(algorithm, validation, step)
    return trust_of(algorithm.stn, response, gradients)


def trust_of(stn: "SelfTuningModule", response: Measured, gradients: Measured) -> dict[str, Trust]:
    """What was measured, with the bounds and scales of this moment."""
    bounds, scales = _bounds(stn), stn.hparams.scales().tolist()
    return {
        name: Trust(
            **response.get(name, {}), **gradients.get(name, {}), bound=bounds[name], collapsed=scale < COLLAPSED
        )
        for name, scale in zip(stn.hparams.names, scales, strict=True)
    }


def measure_response(algorithm: Algorithm, content: Any, step: int) -> Measured:
    """What the response promises and delivers on a training batch; nothing where outputs have no axis of examples."""
    stn = algorithm.stn
    seed = _seed(algorithm, step)
    batch = algorithm.prepare(content)
    rows, space = batch.rows, stn.hparams
    device = space.raw.device
    generator = torch.Generator(device).manual_seed(seed)
    # What has one value for a whole batch cannot be perturbed in some of its examples.
    own = torch.tensor([h for h in range(len(space)) if h not in space.per_batch], device=device)
    if not len(own) or not stn.compiled.examples_lead:
        return {}
    size = _examples_in_group(algorithm, rows.total // len(own))
    groups = -(-rows.total // size)
    noise_G = torch.randn(groups, generator=generator, dtype=space.raw.dtype, device=device)
    if size > 1:
        noise_G = torch.ones_like(noise_G)  # few draws: all of the size that is typical; each has its opposite
    # Where there are more hyperparameters than groups for them, others have their turn in another epoch.
    first = torch.randint(len(own), (1,), generator=generator, device=device)
    which_G = own[(torch.randperm(groups, generator=generator, device=device) + first) % len(own)]
    noise_B, which_B = (each.repeat_interleave(size)[rows.start : rows.stop] for each in (noise_G, which_G))
    delta_BH = torch.nn.functional.one_hot(which_B, len(space)) * (space.scales().detach() * noise_B[:, None])
    pair = []
    with training_mode(stn):
        for sign in (1, -1):
            places = {str(each): torch.Generator(each) for each in (device, torch.device("cpu"))}
            for each in places.values():  # the same masks for both; other ones in every process
                each.manual_seed((seed + rows.start + 1) % 2**63)
            with stn.drawing_from(places), stn.in_groups(size if size > 1 else None, rows.start):
                slopes = _slopes(algorithm, batch, (sign * delta_BH).to(space.raw.dtype))
            pair.append(slopes)
    slopes_3B = (torch.stack(pair[0]) + torch.stack(pair[1])) / 2
    promised_B = -slopes_3B[0] / 2
    delivered_B = -(slopes_3B[0] + 4 * slopes_3B[1] + slopes_3B[2]) / 6  # Simpson's rule: exact to third order
    result = {}
    for index, name in enumerate(space.names):
        mine_B = which_B == index
        promised, promised_error = _statistics(algorithm, promised_B[mine_B])
        delivered, delivered_error = _statistics(algorithm, delivered_B[mine_B])
        result[name] = {
            "promised": promised,
            "promised_error": promised_error,
            "delivered": delivered,
            "delivered_error": delivered_error,
        }
    return result


def _slopes(algorithm: Algorithm, batch: Batch, delta_BH: Tensor) -> list[Tensor]:
    """Derivative of each example's loss by ``a``, (B,), at ``a`` = 0, 1/2 and 1.

    The hyperparameters are perturbed by `delta_BH`, the weights changed by ``a`` times the response to it.
    """
    stn, objective = algorithm.stn, algorithm.objective
    centre_H, size = stn.hparams.raw.detach(), len(delta_BH)
    raw_BH = centre_H + delta_BH
    hyperparameters = {name: value_B.detach() for name, value_B in named_values(stn, raw_BH).items()}
    with algorithm.precision(), torch.no_grad():
        mixed = mix(stn, batch, hyperparameters)
        passed = mixed.batch.feed(stn.linearize_with_activations, raw=raw_BH)
    slopes = []
    for a in (0.0, 0.5, 1.0):
        a_B = torch.full_like(raw_BH[:, 0], a, requires_grad=True)
        scaled_BH = centre_H + a_B[:, None] * delta_BH
        with torch.enable_grad(), algorithm.precision():
            output = tree_map(lambda p, t, a_B=a_B: _along(p, t, a_B), passed.primal, passed.tangent)
            pairs = zip(passed.activations, passed.activation_tangents, strict=True)
            activations = [_along(p, t, a_B) for p, t in pairs]
            moved = mixed.with_targets(output)
            loss = objective.training_loss(output, moved, hyperparameters)
            loss = sum(other_penalties(stn, output, hyperparameters, scaled_BH, moved, activations), loss)
            loss = loss + _decay(stn, hyperparameters, a_B[:, None] * delta_BH)
        (slope_B,) = torch.autograd.grad(loss, a_B, allow_unused=True, materialize_grads=True)
        slopes.append(size * slope_B)
    return slopes


def _decay(stn: "SelfTuningModule", hyperparameters: dict[str, Tensor], delta_BH: Tensor) -> Tensor:
    """``mean_i decay_i |w0 + DeltaW_i|^2 / 2`` without ``|w0|^2``, which does not depend on the response."""
    total = delta_BH.new_zeros(())
    with torch.autocast(delta_BH.device.type, enabled=False):
        for name, group in penalized_groups(stn, "weight_decay").items():
            weights = stn.penalized(group)
            for each, response in stn.responses_of_parameters(weights):
                change_B = response.squared_norm_change(weights[each].detach(), delta_BH)
                total = total + (0.5 * hyperparameters[name] * change_B).mean()
    return total


def _along(primal: Any, tangent: Any, a_B: Tensor) -> Any:
    if not isinstance(primal, Tensor) or not isinstance(tangent, Tensor) or not primal.is_floating_point():
        return primal
    return primal + a_B.reshape(-1, *[1] * (primal.ndim - 1)).to(primal.dtype) * tangent


def measure_hypergradients(algorithm: Algorithm, content: Any, step: int) -> Measured:
    """Mean and standard error of the hypergradient on a validation batch.

    The response pass takes raw values of every example, so one backward gives the hypergradients of all of them.
    """
    stn = algorithm.stn
    batch = algorithm.prepare(content)
    generator = torch.Generator(stn.hparams.raw.device).manual_seed(_seed(algorithm, step))
    raw_BH = _sampled(algorithm, batch, generator).detach().requires_grad_()
    with algorithm.precision(), stn.in_groups(_group(algorithm), batch.rows.start):
        output = batch.feed(stn.respond_with_statistics, raw=raw_BH)
        loss = algorithm.objective.validation_loss(output, batch, named_values(stn, raw_BH.detach()))
    (gradient_BH,) = torch.autograd.grad(loss, raw_BH, allow_unused=True, materialize_grads=True)
    result = {}
    for name, each_B in zip(stn.hparams.names, (len(raw_BH) * gradient_BH).unbind(1), strict=True):
        mean, error = _statistics(algorithm, each_B)
        result[name] = {"hypergradient": mean, "hypergradient_error": error}
    return result


def _examples_in_group(algorithm: Algorithm, wanted: int) -> int:
    """How many examples share a perturbation: as in inner steps, or fewer, so that each hyperparameter has its turn."""
    group = _group(algorithm)
    if group is None or not algorithm.stn.compiled.takes_batch_statistics:
        return 1
    return max(min(group, wanted), min(group, FEWEST))


def _group(algorithm: "Algorithm | DeltaSTN") -> int | None:
    sampling = getattr(algorithm, "sampling", None)
    return None if sampling is None else sampling.group


def _seed(algorithm: Algorithm, step: int) -> int:
    """The same in every process: the generator of the perturbations has it in common, those of the masks differ."""
    return (algorithm.perturbations.initial_seed() + MEASUREMENT + PER_STEP * step) % 2**63


def _sampled(algorithm: "Algorithm | DeltaSTN", batch: Batch, generator: torch.Generator) -> Tensor:
    """Perturbed as the algorithm's own outer steps are, where it says how."""
    space, sampling = algorithm.stn.hparams, getattr(algorithm, "sampling", None)
    if sampling is None:
        return space.raw.expand(batch.rows.stop - batch.rows.start, -1)
    return sampling.outer(space, batch.rows, generator)


def _statistics(algorithm: Algorithm, values_B: Tensor) -> tuple[float | None, float | None]:
    """Mean and its standard error over the examples of all processes; None for fewer than two, or not finite."""
    values_B = values_B.detach().double()
    local = [float(len(values_B)), *torch.stack([values_B.sum(), values_B.square().sum()]).tolist()]
    count, total, squares = algorithm.replicas.sums(local, device_of(algorithm.stn))
    if count < 2 or not math.isfinite(squares):
        return None, None
    mean = total / count
    variance = max(0.0, squares - count * mean**2) / (count - 1)
    return mean, math.sqrt(variance / count)


def _bounds(stn: "SelfTuningModule") -> dict[str, str | None]:
    """Where each value is at a bound; discrete ones before they are rounded."""
    space = stn.hparams
    raw_H = space.raw.detach().double()
    values = constrain(raw_H, space.low_H.double(), space.high_H.double()).tolist()
    found: dict[str, str | None] = {}
    for each, value in zip(space.resolved, values, strict=True):
        found[each.name] = at_bound(value, each.low, each.high, each.initial)
    return found
