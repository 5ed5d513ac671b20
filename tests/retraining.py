"""Convex problems on which the response of one entry of the catalogue is compared with retraining.

Weights are vectors, so their response is the exact Jacobian, and minima are found to machine precision by L-BFGS on a
training set with frozen random numbers; the Monte Carlo error is known from repetitions with others.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

import stn_fx
from stn_fx.bilevel import Objective, PerExample
from stn_fx.bilevel.apply import Updater
from stn_fx.bilevel.mixing import mix
from stn_fx.bilevel.objective import as_objective
from stn_fx.bilevel.penalties import penalties
from stn_fx.bilevel.replicas import Rows
from stn_fx.bilevel.updates import named_values, response_update

STEPS, RATE = 400, 0.02


def squared_error(output, target):
    return (output - target).square()


class Weighted(nn.Module):
    """A number (B,) of features (B, F), or two scores where ``scores``; a sum over the features times weights."""

    def __init__(self, features: nn.Module, count: int, scores: bool = False):
        super().__init__()
        self.features, self.scores = features, scores
        self.weight, self.bias = nn.Parameter(torch.zeros(count)), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        value = (self.features(x) * self.weight).sum(1) + self.bias
        return torch.stack([-value / 2, value / 2], 1) if self.scores else value


@dataclass
class Problem:
    """One entry, data and model. ``copies`` of the training set, and repetitions: one each where nothing is random."""

    hparams: str
    model: Callable[[], nn.Module]
    train: tuple
    valid: tuple
    loss: Callable = squared_error
    copies: int = 1
    repetitions: int = 1
    step: float = 0.4
    response_copies: int = 16
    options: dict = field(default_factory=dict)


@dataclass
class Comparison:
    """By hyperparameter: slope of the validation loss by retraining, its standard error, and the predicted slope."""

    name: str
    retrained: float
    error: float
    predicted: float

    def __str__(self):
        return f"{self.name}: predicted {self.predicted:.4g}, retrained {self.retrained:.4g} +- {self.error:.2g}"


def compare(problem: Problem) -> list[Comparison]:
    torch.manual_seed(0)
    stn = stn_fx.transform(problem.model().double(), problem.hparams, (problem.train[0],), seed=0, **problem.options)
    stn.train()
    centre = stn.hparams.raw.detach().clone()
    objective = as_objective(problem.loss)
    seeds = range(problem.repetitions)
    solution = mean_of([retrained(stn, objective, problem, centre, seed) for seed in seeds])
    slopes = []
    for column in range(len(centre)):
        shift = problem.step * torch.eye(len(centre), dtype=centre.dtype)[column]
        each = []
        for seed in seeds:
            losses = []
            for sign in (1, -1):
                load(stn.model, solution)
                load(stn.model, retrained(stn, objective, problem, centre + sign * shift, seed))
                losses.append(valid_loss(stn.model.eval(), problem))
                stn.train()
            each.append((losses[0] - losses[1]) / (2 * problem.step))
        slopes.append(torch.stack(each))
    load(stn.model, solution)
    with torch.no_grad():
        stn.hparams.raw.copy_(centre)
    learn_response(stn, objective, problem)
    loss = problem.loss(stn.respond(problem.valid[0]), problem.valid[1]).mean()
    predicted = torch.autograd.grad(loss, stn.hparams.raw)[0]
    return [
        Comparison(name, s.mean().item(), s.std(correction=0).item() / max(len(s) - 1, 1) ** 0.5, p.item())
        for name, s, p in zip(stn.hparams.names, slopes, predicted, strict=True)
    ]


def retrained(stn, objective: Objective, problem: Problem, raw, seed: int) -> dict:
    """The weights at the minimum of the training loss at these hyperparameters, from where the model stands."""
    with torch.no_grad():
        stn.hparams.raw.copy_(raw)
    batch = objective.batch(repeated(problem.train, problem.copies), torch.device("cpu"))
    values = named_values(stn, raw.expand(len(batch.content[-1]), -1))
    optimizer = torch.optim.LBFGS(
        stn.base_parameters(), max_iter=60, history_size=30, line_search_fn="strong_wolfe",
        tolerance_grad=1e-7, tolerance_change=1e-10,
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        stn.generator().manual_seed(seed)
        with stn.watching() as activations:
            mixed = mix(stn, batch, values)
            output = mixed.batch.feed(stn)
        done = mixed.with_targets(output)
        loss = objective.training_loss(output, done, values)
        loss = sum(penalties(stn, output, values, None, done, activations), loss)
        loss.backward()
        return loss

    optimizer.step(closure)
    return {name: p.detach().clone() for name, p in stn.model.named_parameters()}


def learn_response(stn, objective: Objective, problem: Problem) -> None:
    optimizer = torch.optim.Adam(stn.response_parameters(), lr=RATE)
    updater = Updater([optimizer], "response")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    batch = objective.batch(repeated(problem.train, problem.response_copies), torch.device("cpu"))
    for _ in range(STEPS):
        size = len(batch.content[-1])
        raw_BH = PerExample().inner(stn.hparams, Rows(0, size, size), stn.generator()).detach()
        response_update(stn, objective, updater, batch, [raw_BH], nullcontext())
        schedule.step()


def repeated(data, copies):
    return tuple(each.repeat(copies, *[1] * (each.ndim - 1)) for each in data)


def mean_of(solutions):
    return {name: torch.stack([each[name] for each in solutions]).mean(0) for name in solutions[0]}


def load(model, weights):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def valid_loss(model, problem):
    with torch.no_grad():
        return problem.loss(model(problem.valid[0]), problem.valid[1]).mean()


def cross_entropy(output, target):
    return F.cross_entropy(output, target, reduction="none")
