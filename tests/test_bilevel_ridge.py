"""Ridge regression: the response that the stochastic steps learn, against its closed form (exact: `test_ridge`)."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from bilevel_fake import regression_batches
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

import stn_fx
from stn_fx.bilevel import DeltaSTN, EveryKth, Linearized


def ridge_weights(x, y, decay):
    """argmin over w of mean_i (x_i w - y_i)^2 + 0.5 * decay * |w|^2, shape (I, 1)."""
    identity = torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(2 * x.t() @ x / len(x) + decay * identity, 2 * x.t() @ y / len(x))


def linearized_best_response(x, weights, raw, scale):
    """argmin over g of E[mean_i (x_i w - y_i + e x_i g)^2 + 0.5 * decay(raw + e) * |w + e g|^2], e normal, shape (I,).

    Quadratic in g, with moments of decay(raw + e) by Gauss-Hermite quadrature: decay is a sigmoid onto (0, 1).
    """
    nodes, probabilities = np.polynomial.hermite_e.hermegauss(60)
    e, p = (torch.tensor(each, dtype=x.dtype) for each in (scale * nodes, probabilities / probabilities.sum()))
    decay = torch.sigmoid(raw + e)
    first, second = (p * decay * e).sum(), (p * decay * e**2).sum()
    curvature = 2 * scale**2 * x.t() @ x / len(x) + second * torch.eye(x.shape[1], dtype=x.dtype)
    return -torch.linalg.solve(curvature, first * weights).flatten()


def wrap(hparams):
    torch.manual_seed(0)
    model = nn.Linear(8, 1, bias=False, dtype=torch.float64)
    return stn_fx.transform(model, hparams, example_inputs=(torch.randn(4, 8, dtype=torch.float64),), seed=0)


def learned_response(scale, x, y, steps, copies):
    """Wrapped model and learned DeltaW per raw unit, (I,), with the hyperparameter held fixed."""
    stn = wrap(f"weight_decay(initial=0.3, scale={scale})")
    with torch.no_grad():
        stn.model.weight.copy_(ridge_weights(x, y, 0.3).t())
    response_optimizer = Adam(stn.response_parameters(), lr=0.02)
    schedule = LambdaLR(response_optimizer, lambda step: 1 - step / steps)
    optimizers = {"base_optimizer": partial(SGD, lr=0.1), "response_optimizer": response_optimizer}
    algorithm = DeltaSTN(stn, F.mse_loss, response_step=EveryKth(Linearized(), 2), **optimizers)
    # Every example many times in the batch, with an own perturbation each: the same objective with less noise.
    batch = (x.repeat(copies, 1), y.repeat(copies, 1))
    for _ in range(steps):
        algorithm.inner_step(batch)
        schedule.step()
    return stn, stn.weight_response(torch.ones(1, dtype=torch.float64))["weight"].detach().flatten()


def test_the_response_converges_to_the_minimiser_of_the_linearized_objective():
    ((x, y),) = regression_batches(0, 64, batch_size=64)
    stn, actual = learned_response(0.5, x, y, steps=800, copies=32)
    expected = linearized_best_response(x, stn.model.weight.detach().t(), stn.hparams.raw.item(), scale=0.5)
    assert (actual - expected).norm() / expected.norm() < 0.05
