"""Ridge regression, where everything is known exactly: the best response, its Jacobian, and the best weight decay.

Notation: weights W (O, D), A = X^T X / N, lambda the weight decay, delta the displacement in raw space, s its scale.
With one hyperparameter the row-wise response is ``DeltaW = delta * M`` with any M = diag(V) U, so it can be exact.
"""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, RMSprop

import stn_fx
from stn_fx.bilevel import DeltaSTN

N, D, OUTPUTS = 24, 6, 3


class Problem:
    """Noisy linear regression with few examples to train on and many to validate on."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        truth = 0.4 * normal(OUTPUTS, D)
        self.x, self.x_valid = normal(N, D), normal(400, D)
        self.y = self.x @ truth.t() + 1.5 * normal(N, OUTPUTS)
        self.y_valid = self.x_valid @ truth.t() + 1.5 * normal(400, OUTPUTS)
        self.A = self.x.t() @ self.x / N
        self.C = self.y.t() @ self.x / N

    def optimum(self, decay: Tensor | float) -> Tensor:
        """The minimiser W* of ``mean_i |W x_i - y_i|^2 / 2 + decay |W|^2 / 2``."""
        return self.C @ torch.linalg.inv(self.A + decay * torch.eye(D, dtype=torch.float64))

    def valid_loss(self, weights: Tensor) -> float:
        return float(per_example_loss(self.x_valid @ weights.t(), self.y_valid).mean())


def per_example_loss(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum(-1)


PROBLEM = Problem()


def made(initial: float, scale: float, response: Any = "rowwise", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = nn.Linear(D, OUTPUTS, bias=False).double()
    decay = stn_fx.Hyperparameter("weight_decay", initial=initial, low=0.0, high=4.0, scale=scale)
    return stn_fx.transform(model, [decay], (PROBLEM.x,), response=response, seed=seed)


def quadrature(scale: float, nodes: int = 9) -> tuple[Tensor, Tensor]:
    """Displacements and weights with ``E f(delta) = sum_q w_q f(delta_q)`` for delta ~ N(0, scale^2)."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.tensor(scale * points), torch.tensor(weights / weights.sum())


def moments(stn: Any, scale: float) -> tuple[Tensor, Tensor]:
    """E[lambda(delta) delta] and E[lambda(delta) delta^2]."""
    points, weights = quadrature(scale, 40)
    decay = stn.hparams.constrain(stn.hparams.raw.detach() + points.unsqueeze(1))[:, 0]
    return (weights * decay * points).sum(), (weights * decay * points.square()).sum()


def learn_response(stn: Any, scale: float) -> Tensor:
    """Minimise the linearized objective over the response, perturbations integrated exactly; returns M (O, D)."""
    points, weights = quadrature(scale)
    raw = stn.hparams.raw.detach() + points.repeat(N).unsqueeze(1)  # every example at every node
    x, y = (t.repeat_interleave(len(points), 0) for t in (PROBLEM.x, PROBLEM.y))
    importance = weights.repeat(N) / N
    decay = stn.hparams.constrain(raw)[:, 0]
    optimizer = torch.optim.LBFGS(
        list(stn.response_parameters()),
        max_iter=600,
        tolerance_grad=1e-13,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        primal, tangent = stn.linearize(x, raw=raw)
        losses = per_example_loss(primal + tangent, y) + 0.5 * decay * stn.squared_norm(raw)
        loss = (importance * losses).sum() / scale**2
        loss.backward()
        return loss

    optimizer.step(closure)
    return stn.weight_response(torch.ones(1, dtype=torch.float64))["weight"].detach()


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("response", ["rowwise", stn_fx.LowRank(2)], ids=["row-wise", "low-rank"])
def test_the_response_converges_to_the_minimiser_of_the_linearized_objective(scale: float, response: Any) -> None:
    """Stationarity in M of ``E_delta[...]``: ``s^2 M A + E[lambda delta^2] M + E[lambda delta] W0 = 0``."""
    stn = made(0.4, scale, response)
    with torch.no_grad():
        stn.model.weight.copy_(PROBLEM.optimum(stn.hparams.values()["weight_decay"]))
    first, second = moments(stn, scale)
    W0 = stn.model.weight.detach()
    best = -first * W0 @ torch.linalg.inv(scale**2 * PROBLEM.A + second * torch.eye(D, dtype=torch.float64))
    learned = learn_response(stn, scale)
    if response == "rowwise":
        assert (learned - best).norm() / best.norm() < 0.05
    else:  # rank 2 of 3: near the best of that rank in angle
        assert F.cosine_similarity(learned.flatten(), best.flatten(), 0) > 0.9


def test_the_response_goes_to_the_best_response_jacobian_as_the_scale_goes_to_zero() -> None:
    stn = made(0.4, 0.5)
    decay = stn.hparams.values()["weight_decay"]
    with torch.no_grad():
        stn.model.weight.copy_(PROBLEM.optimum(decay))
    step = 1e-5
    ahead, behind = (PROBLEM.optimum(stn.hparams.constrain(stn.hparams.raw.detach() + s * step)[0]) for s in (1, -1))
    jacobian = (ahead - behind) / (2 * step)
    cosines, errors = [], []
    for scale in (1.0, 0.3, 0.05):
        learned = learn_response(stn, scale)
        cosines.append(F.cosine_similarity(learned.flatten(), jacobian.flatten(), 0).item())
        errors.append(((learned - jacobian).norm() / jacobian.norm()).item())
    assert cosines[-1] > 0.99
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-1] < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("initial", [0.02, 3.0], ids=["from below", "from above"])
def test_the_tuned_weight_decay_reaches_the_optimum_of_the_validation_loss(initial: float, seed: int) -> None:
    stn = made(initial, 0.3, seed=seed)
    steps = DeltaSTN(
        stn,
        per_example_loss,
        base_optimizer=partial(SGD, lr=0.1),
        response_optimizer=partial(SGD, lr=0.1),
        hyper_optimizer=partial(RMSprop, lr=0.03),
        scale_optimizer=partial(RMSprop, lr=0.003),
    )
    # Every example many times in the batch, with a perturbation of its own each time: the same objective, less noise.
    batch = (PROBLEM.x.repeat(16, 1), PROBLEM.y.repeat(16, 1))
    for i in range(1500):
        steps.inner_step(batch)
        if i > 100 and i % 3 == 0:
            steps.outer_step((PROBLEM.x_valid, PROBLEM.y_valid))
    losses = {decay: PROBLEM.valid_loss(PROBLEM.optimum(decay)) for decay in np.geomspace(1e-3, 3.9, 400)}
    best, start = min(losses.values()), PROBLEM.valid_loss(PROBLEM.optimum(initial))
    tuned = PROBLEM.valid_loss(PROBLEM.optimum(stn.hparams.values()["weight_decay"]))
    assert tuned - best < 0.1 * (start - best), (
        stn.hparams.values(),
        min(losses, key=losses.__getitem__),
        best,
        start,
        tuned,
    )
