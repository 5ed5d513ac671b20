"""How the response is learned in an inner step: one small class for each way, all with the same interface.

| class | what | source |
|---|---|---|
| `Linearized` | linearized pass, base detached | Delta-STN (Bae & Grosse 2020) |
| `WithoutLinearization` | the perturbed network itself, base detached | its ablation in the same paper |
| `EveryKth(step, k)` | another way, in every k-th inner step only | cheaper |
| `OnFraction(step, p)` | another way, on a fraction of the batch | cheaper |

The first two take antithetic perturbations: each batch passes at a perturbation and at its opposite, with the same
masks. What the response learns from is how the gradient of the weights *changes* with the hyperparameters, and that is
small beside the gradient itself, which the papers' single draw multiplies with the perturbation: noise, which in the
difference of the two passes cancels.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from stn_fx.arguments import require_count
from stn_fx.bilevel.apply import Outcome
from stn_fx.bilevel.batch import Batch, batch_size
from stn_fx.bilevel.generators import default_generators
from stn_fx.bilevel.objective import Objective
from stn_fx.bilevel.updates import Precision, linearized_response_loss, perturbed_response_loss, response_update
from stn_fx.errors import InputError

if TYPE_CHECKING:
    from stn_fx.bilevel.steps import DeltaSTN
    from stn_fx.transform import SelfTuningModule


class ResponseStep(ABC):
    """One update of the response parameters by a training batch."""

    @abstractmethod
    def __call__(self, algorithm: "DeltaSTN", batch: Batch) -> Outcome | None:
        """Update; None where this batch is passed over."""

    def begin(self) -> None:  # noqa: B027 (most ways count nothing)
        """Before a run: the next inner step is the first."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        assert not state, "a way with a state reads it"


class _Perturbed(ResponseStep):
    """By a training loss at perturbed hyperparameters.

    Args:
        antithetic: whether every batch passes at a perturbation and at its opposite with the same masks; that takes two
            passes. Else once, as in the papers.
    """

    def __init__(self, antithetic: bool = True) -> None:
        self.antithetic = antithetic

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}(antithetic={self.antithetic})"

    @staticmethod
    @abstractmethod
    def loss(
        stn: "SelfTuningModule", objective: Objective, batch: Batch, raw_BH: Tensor, precision: Precision
    ) -> Tensor:
        """Of one pass."""

    def __call__(self, algorithm: "DeltaSTN", batch: Batch) -> Outcome:
        stn, sampling = algorithm.stn, algorithm.sampling
        raws = [sampling.inner(stn.hparams, batch.rows, algorithm.perturbations).detach()]
        if self.antithetic:
            raws.append(sampling.opposite(stn.hparams, raws[0]))
        # A model may draw random numbers of its own from the global generators.
        generators = [*algorithm.response_masks.values(), *default_generators(stn.hparams.raw.device)]
        states = [generator.get_state() for generator in generators]

        def same_draws(*arguments: Any) -> Tensor:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            return self.loss(*arguments)

        passes = (stn, algorithm.objective, algorithm.updaters["response"], batch, raws, algorithm.precision())
        with stn.drawing_from(algorithm.response_masks), stn.in_groups(sampling.group, batch.rows.start):
            outcome = response_update(*passes, same_draws)
        for generator, state in list(zip(generators, states, strict=True))[len(algorithm.response_masks) :]:
            generator.set_state(state)  # learning the response leaves no trace in the training of the model
        return outcome


class Linearized(_Perturbed):
    """By the linearized pass `f(x; w0) + J_w f . DeltaW(delta)`."""

    loss = staticmethod(linearized_response_loss)


class WithoutLinearization(_Perturbed):
    """By the perturbed network `f(x; w0 + DeltaW(delta))` in training mode: cheaper, and biased where f is curved.

    Its batch norms take the statistics of the whole batch, whatever groups are perturbed alike (see `PerGroup`).
    """

    loss = staticmethod(perturbed_response_loss)


class EveryKth(ResponseStep):
    """Another way in every k-th inner step, beginning with the first.

    Where several batches are accumulated, in all batches of every k-th update.

    Args:
        step: the way.
        k: 1 for every inner step.
    """

    def __init__(self, step: ResponseStep, k: int) -> None:
        require_count("k", k)
        self.step = step
        self.k = k
        self._passed = 0

    def __repr__(self) -> str:
        return f"EveryKth({self.step}, {self.k})"

    def __call__(self, algorithm: "DeltaSTN", batch: Batch) -> Outcome | None:
        due = self._passed // algorithm.updates.accumulate % self.k == 0
        self._passed += 1
        return self.step(algorithm, batch) if due else None

    def begin(self) -> None:
        self._passed = 0
        self.step.begin()

    def state_dict(self) -> dict[str, Any]:
        return {"passed": self._passed, "step": self.step.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._passed = state["passed"]
        self.step.load_state_dict(state["step"])


class OnFraction(ResponseStep):
    """Another way on the first examples of every batch, which a shuffling loader makes a random part of it.

    Args:
        step: the way.
        fraction: of the examples, in (0, 1]; rounded up. Batch norms see the statistics of these examples.
    """

    def __init__(self, step: ResponseStep, fraction: float) -> None:
        if not 0 < fraction <= 1:
            raise InputError(f"fraction={fraction}: it must lie between 0 and 1.")
        self.step = step
        self.fraction = fraction

    def __repr__(self) -> str:
        return f"OnFraction({self.step}, {self.fraction})"

    def __call__(self, algorithm: "DeltaSTN", batch: Batch) -> Outcome | None:
        size = math.ceil(self.fraction * batch_size(algorithm.stn, batch))
        part = _first(batch, batch_size(algorithm.stn, batch), algorithm.stn.compiled.captured.batch_axes, size)
        return self.step(algorithm, replace(part, rows=algorithm.replicas.rows(size, algorithm.perturbations.device)))

    def begin(self) -> None:
        self.step.begin()

    def state_dict(self) -> dict[str, Any]:
        return self.step.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step.load_state_dict(state)


def _first(batch: Batch, size: int, axes: list[int | None], count: int) -> Batch:
    """The first examples of a batch: inputs along their batch axes, the rest of its content along axis 0."""
    remaining = iter(axes)
    cut: dict[int, Tensor] = {}

    def cut_input(leaf: Any) -> Any:
        axis = next(remaining)
        if axis is None or not isinstance(leaf, Tensor):
            return leaf
        return cut.setdefault(id(leaf), torch.narrow(leaf, axis, 0, count))

    def cut_other(leaf: Any) -> Any:
        if id(leaf) in cut:
            return cut[id(leaf)]
        rows = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == size
        return leaf[:count] if rows else leaf

    inputs = tree_map(cut_input, batch.inputs)
    return replace(batch, inputs=inputs, content=tree_map(cut_other, batch.content))
