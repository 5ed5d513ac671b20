"""Every entry matters: the learned response predicts what retraining at other values does to the validation loss.

A linear model under squared loss, so that training at fixed hyperparameters is a least-squares problem over augmented
copies of the training set, solved exactly; its Monte Carlo error is known from independent repetitions.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stn_fx
from stn_fx.bilevel import Objective
from stn_fx.bilevel.apply import Updater
from stn_fx.bilevel.updates import response_update

SIDE, TRAIN, VALID, COPIES, REPETITIONS, STEP = 5, 300, 2000, 50, 5, 0.4
STEPS, RATE = 500, 0.02


class Echo(nn.Module):
    """Linear in its input, which it returns as well, in units of variance 1: gradient descent converges soon."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * SIDE * SIDE, 1)

    def forward(self, x):
        features = standardised(x)
        return self.head(features)[:, 0], features


def standardised(x):
    """Uniform pixels as features of mean 0 and variance 1."""
    return (x.flatten(1) - 0.5) * 12**0.5


def data(seed, count):
    """Images of independent pixels, uniform in [0, 1], and a linear function of them with noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    truth = torch.randn(3 * SIDE * SIDE, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    y = standardised(x) @ truth + 8.0 * torch.randn(count, generator=generator, dtype=torch.float64)
    return x, y


def augmented(stn, x, y, raw, seed):
    """Inputs and targets of COPIES passes over the training set with all hyperparameters at `raw`."""
    stn.generator().manual_seed(seed)
    x, y = x.repeat(COPIES, 1, 1, 1), y.repeat(COPIES)
    with torch.no_grad():
        stn.hparams.raw.copy_(raw)
        return stn(x)[1], y


def solve(features, target):
    """Weights and bias that minimise the mean squared error, as one vector with the bias last."""
    features = torch.cat([features, torch.ones_like(features[:, :1])], 1)
    return torch.linalg.solve(features.T @ features, features.T @ target)


def valid_loss(solution, x, y):
    return F.mse_loss(standardised(x) @ solution[:-1] + solution[-1], y)


INITIAL = {
    "input_dropout": 0.2, "input_scale": 0.9, "gaussian_noise": 0.2, "horizontal_flip": 0.3, "rotation": 25,
    "translation": 0.15, "scaling": 0.2, "shear": 12, "gaussian_blur": 0.8, "brightness": 0.6, "saturation": 0.9,
    "hue": 0.2,
}  # fmt: skip
"""Values at which an entry moves this problem's validation loss.

Not here but in `test_every_entry_matters.py`: entries with two components (a row-wise response of one output gives both
the same direction), contrast (its slope is so small here that these steps do not learn its response to a factor of 2),
mixup (it shrinks both sides of the normal equations alike), and what needs another model or loss.
"""


@pytest.mark.slow
@pytest.mark.parametrize("entry", INITIAL)
def test_the_response_predicts_what_retraining_gives(entry):
    torch.manual_seed(0)
    (x, y), (x_valid, y_valid) = data(0, TRAIN), data(1, VALID)
    hparams = f"{entry}(initial={INITIAL[entry]})"
    stn = stn_fx.transform(Echo().double(), hparams, (x,), seed=0, image_format=stn_fx.ImageFormat())
    centre = stn.hparams.raw.detach().clone()

    def trained(shift, seed):
        return solve(*augmented(stn, x, y, centre + shift, seed))

    slopes = torch.stack(
        [
            (valid_loss(trained(STEP, seed), x_valid, y_valid) - valid_loss(trained(-STEP, seed), x_valid, y_valid))
            / (2 * STEP)
            for seed in range(REPETITIONS)
        ]
    )
    slope, error = slopes.mean().item(), slopes.std().item() / REPETITIONS**0.5
    assert abs(slope) > 2 * error, "the problem does not show the effect of this entry"

    solution = torch.stack([trained(0.0, seed) for seed in range(REPETITIONS)]).mean(0)
    with torch.no_grad():
        stn.hparams.raw.copy_(centre)
        stn.model.head.weight.copy_(solution[:-1])
        stn.model.head.bias.copy_(solution[-1])

    def squared_error(output, content, values):
        return (output[0] - content[1]).square()

    objective = Objective(train=squared_error)
    optimizer = torch.optim.Adam(stn.response_parameters(), lr=RATE)
    updater = Updater([optimizer], "response")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    batch = objective.batch((x.repeat(16, 1, 1, 1), y.repeat(16)), torch.device("cpu"))
    for _ in range(STEPS):
        raw_BH = stn.hparams.sample(len(batch.inputs[0]), generator=stn.generator()).detach()
        response_update(stn, objective, updater, batch, [raw_BH], nullcontext())
        schedule.step()
    loss = F.mse_loss(stn.respond(x_valid)[0], y_valid)
    predicted = torch.autograd.grad(loss, stn.hparams.raw)[0].item()
    message = f"predicted {predicted:.4g}, retrained {slope:.4g} +- {error:.2g}"
    assert 0.5 < predicted / slope < 2, message
