"""How the tuning methods of `quality.py` train: Delta-STN as stn_fx has it, cheaper and other settings of it, STN."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from quality_tasks import Task
from quality_training import Cost, Way, sgd
from torch.optim import RMSprop

import stn_fx
from stn_fx.bilevel import STN, DeltaSTN, EveryKth, Linearized, OnFraction, SharedForward
from stn_fx.bilevel.response_step import EVERY, FRACTION, LEAST, ResponseStep
from stn_fx.bilevel.trainer import TRAIN_STEPS as USUAL_TRAIN_STEPS
from stn_fx.transform import ResponseForm

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule

Costs = dict[str, Cost]

TRAIN_STEPS, WARM_UP, OUTER_RATE = 2, 0.2, 0.025
"""T_train, the share of the epochs without outer steps, and the rate of RMSprop for hyperparameters (scales:
0.03), for STN and `frequent`.  Chosen on the published start of `fashion`, one seed each."""
RANK = 32
"""Of the method `low_rank`."""


def _as_the_papers(task: Task, wrapped: "SelfTuningModule") -> DeltaSTN:
    """One linearized pass in each inner step."""
    optimizers = {"base_optimizer": sgd(task), "response_optimizer": sgd(task)}
    return DeltaSTN(wrapped, response_step=Linearized(antithetic=False), **optimizers)


def _on_part_of_the_batch(task: Task, wrapped: "SelfTuningModule") -> DeltaSTN:
    """The same on as much of the batch as by default."""
    optimizers = {"base_optimizer": sgd(task), "response_optimizer": sgd(task)}
    return DeltaSTN(wrapped, response_step=OnFraction(Linearized(antithetic=False), FRACTION, LEAST), **optimizers)


MEASURED: dict[str, Callable[[Task, "SelfTuningModule"], STN | DeltaSTN]] = {
    "part_of_batch": _on_part_of_the_batch,
    "stn": lambda task, wrapped: STN(wrapped, base_optimizer=sgd(task), response_optimizer=sgd(task)),
    "delta_stn": _as_the_papers,
    "low_rank": _as_the_papers,
    "two_terms": _as_the_papers,
    "shared_forward": lambda task, wrapped: SharedForward(
        wrapped, every=1, antithetic=False, base_optimizer=sgd(task), response_optimizer=sgd(task)
    ),
}
"""What `quality.py costs` measures; the costs of all others follow from these."""

RESPONSES: dict[str, ResponseForm] = {
    "low_rank": stn_fx.LowRank(RANK),
    "two_terms": stn_fx.RowWise(2),
}
"""Forms of the response that differ from the default, by what is measured."""


def _delta_stn(task: Task, costs: Costs) -> Way:
    """Delta-STN with everything as the trainer has it by itself; only the optimizers of training are the task's."""
    cost = replace(costs["delta_stn"], inner=1 + 2 / EVERY * (costs["part_of_batch"].inner - 1))
    own = {"base_optimizer": sgd(task), "response_optimizer": sgd(task)}
    return Way(lambda wrapped: DeltaSTN(wrapped, **own), cost, train_steps=USUAL_TRAIN_STEPS, warmup=None)


def _frequent(
    task: Task,
    costs: Costs,
    kind: str = "delta_stn",
    step: ResponseStep | None = None,
    passes: float = 2 / EVERY,
    train_steps: int = TRAIN_STEPS,
    scale: float | None = None,
) -> Way:
    """Delta-STN with a response that learns from whole batches, a shorter warm-up and a lower outer rate.

    Args:
        task: what is trained.
        costs: what was measured.
        kind: of the response; a key of `costs`.
        step: how it learns; antithetic perturbations in every `EVERY`-th inner step where None.
        passes: linearized passes over a whole batch, for each inner step.
        train_steps: T_train.
        scale: of the perturbation, at which it stays; tuned where None.
    """
    cost = replace(costs[kind], inner=1 + passes * (costs[kind].inner - 1))

    def build(wrapped: "SelfTuningModule") -> DeltaSTN:
        if scale is not None:
            with torch.no_grad():
                wrapped.hparams.raw_scale.fill_(math.log(math.expm1(scale)))
        own_step = copy.deepcopy(step or EveryKth(Linearized(), EVERY))
        optimizers = _optimizers(task)
        if scale is not None:
            del optimizers["scale_optimizer"]
        return DeltaSTN(wrapped, response_step=own_step, tune_scales=scale is None, **optimizers)

    return Way(build, cost, train_steps, WARM_UP, response=RESPONSES.get(kind, "rowwise"))


def _double_backward(task: Task, costs: Costs) -> Way:
    """The papers' response as their code linearizes it: the same updates, by two reverse passes (see step_cost.py)."""
    way = _frequent(task, costs, step=Linearized(antithetic=False), passes=1)
    return replace(way, cost=replace(way.cost, inner=costs["double_backward"].inner))


def _shared_forward(task: Task, costs: Costs) -> Way:
    """One forward for weights and response in every `EVERY`-th step, and a linearized pass at the opposite."""
    shared, linearized = costs["shared_forward"], costs["delta_stn"]
    cost = replace(shared, inner=1 + (shared.inner + linearized.inner - 2) / EVERY)
    return Way(lambda wrapped: SharedForward(wrapped, every=EVERY, **_optimizers(task)), cost, TRAIN_STEPS, WARM_UP)


def _stn(task: Task, costs: Costs) -> Way:
    """STN (MacKay et al. 2019)."""
    return Way(lambda wrapped: STN(wrapped, **_optimizers(task)), costs["stn"], TRAIN_STEPS, WARM_UP)


def _optimizers(task: Task) -> dict[str, Any]:
    outer = {"hyper_optimizer": partial(RMSprop, lr=OUTER_RATE), "scale_optimizer": partial(RMSprop, lr=0.03)}
    return {"base_optimizer": sgd(task), "response_optimizer": sgd(task)} | outer


TUNERS: dict[str, Callable[[Task, Costs], Way]] = {
    "delta_stn": _delta_stn,
    "stn": _stn,
    "double_backward": _double_backward,
}
"""What is compared, with three seeds."""
FROM_ALL_STARTS = {"delta_stn", "frequent"}
"""The others begin at the published start only."""
NOT_WITH_BATCH_NORMS = {"double_backward"}
"""PyTorch has no third derivative of batch norm."""

HALF_BATCH: dict[str, Any] = {"step": EveryKth(OnFraction(Linearized(), 0.5), EVERY), "passes": 1 / EVERY}

VARIANTS: dict[str, Callable[[Task, Costs], Way]] = {
    "frequent": _frequent,
    "papers": partial(_frequent, step=Linearized(antithetic=False), passes=1),
    "every_second": partial(_frequent, step=EveryKth(Linearized(), 2), passes=1),
    "every_eighth": partial(_frequent, step=EveryKth(Linearized(), 8), passes=0.25),
    "half_batch": partial(_frequent, **HALF_BATCH),
    "cheap": partial(_frequent, **HALF_BATCH, train_steps=10),
    **{form: partial(_frequent, kind=form) for form in ("low_rank", "two_terms")},
    "shared_forward": _shared_forward,
    **{f"train_steps_{steps}": partial(_frequent, train_steps=steps) for steps in (1, 5, 10)},
    **{f"scale_{scale}": partial(_frequent, scale=scale) for scale in (0.1, 0.5, 1.0)},
}
"""The papers' response, what a response costs and what that is worth, the papers' experiments on sensitivity: each
differs from `frequent` in one thing, `cheap` in two.

`cheap` and `half_batch` count half of a batch as half of a pass; it takes 0.57.
"""
