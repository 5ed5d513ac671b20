"""How the response is learned in an inner step: one small class for each way, all with the same interface.

| class | what | source |
|---|---|---|
| `Linearized` | linearized pass, base detached | Delta-STN (Bae & Grosse 2020) |
| `WithoutLinearization` | the perturbed network itself, base detached | its ablation in the same paper |
| `EveryKth(step, k)` | another way, in every k-th inner step only | cheaper |
| `OnFraction(step, p)` | another way, on a fraction of every batch | cheaper |

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


EVERY, FRACTION, LEAST = 4, 0.5, 32
"""The default: half of the examples of every fourth batch, but at least 32 of a batch that has them."""
ROUNDING = 1e-9
"""Of a number of examples."""


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
    """Another way on a fraction of every batch: examples that lie evenly in it, such as every second one.

    Batches that cannot be cut with certainty are taken whole: where something beside the model's inputs has no axis of
    the examples, or more than one axis that might be it. Several processes that share a batch take together what one
    process with the whole batch takes, where their shares are multiples of `1 / fraction`.

    Args:
        step: the way.
        fraction: of the examples, in (0, 1]; rounded up. Batch norms see the statistics of these examples.
        least: examples of the whole batch that are taken at least, where it has them.
    """

    def __init__(self, step: ResponseStep, fraction: float, least: int = 1) -> None:
        if not 0 < fraction <= 1:
            raise InputError(f"fraction={fraction}: it must lie between 0 and 1.")
        require_count("least", least)
        self.step = step
        self.fraction = fraction
        self.least = least

    def __repr__(self) -> str:
        return f"OnFraction({self.step}, {self.fraction}, least={self.least})"

    def __call__(self, algorithm: "DeltaSTN", batch: Batch) -> Outcome | None:
        size = batch_size(algorithm.stn, batch)
        fraction = max(self.fraction, self.least / batch.rows.total)
        chosen = _positions(size, min(1.0, fraction))
        part = None if fraction >= 1 else _part(batch, size, algorithm.stn.compiled.captured.batch_axes, chosen)
        if part is None:
            return self.step(algorithm, batch)
        rows = algorithm.replicas.rows(len(chosen), algorithm.perturbations.device)
        return self.step(algorithm, replace(part, rows=rows))

    def begin(self) -> None:
        self.step.begin()

    def state_dict(self) -> dict[str, Any]:
        return self.step.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step.load_state_dict(state)


def usual_step(every: int = EVERY, fraction: float = FRACTION) -> ResponseStep:
    """The default of `DeltaSTN`, chosen with `examples/benchmarks/quality.py`: two opposite perturbations."""
    return EveryKth(OnFraction(Linearized(), fraction, LEAST), every)


def _positions(size: int, fraction: float) -> Tensor:
    """Of evenly spaced examples, the first among them."""
    count = max(1, math.ceil(size * fraction - ROUNDING))
    return torch.tensor([int(number / fraction) for number in range(count)])


def _part(batch: Batch, size: int, axes: list[int | None], chosen: Tensor) -> Batch | None:
    """Some examples of a batch; None where it is not certain which axes are those of the examples."""
    remaining = iter(axes)
    cut: dict[int, Any] = {}
    certain = True

    def cut_input(leaf: Any) -> Any:
        axis = next(remaining)
        is_cut = axis is not None and isinstance(leaf, Tensor)
        return cut.setdefault(id(leaf), leaf.index_select(axis, chosen.to(leaf.device)) if is_cut else leaf)

    def cut_other(leaf: Any) -> Any:
        nonlocal certain
        if id(leaf) in cut or leaf is None:
            return cut.get(id(leaf))
        # Examples lie along axis 0, or as in the inputs; a square may tell something of every pair of them.
        pairs = isinstance(leaf, Tensor) and leaf.shape == (size, size)
        possible = {0, 1} if pairs else {0, *(axis for axis in axes if axis is not None)}
        fitting = [axis for axis in possible if isinstance(leaf, Tensor) and leaf.shape[axis : axis + 1] == (size,)]
        if len(fitting) == 1:
            return leaf.index_select(fitting[0], chosen.to(leaf.device))
        certain = False
        return leaf

    inputs = tree_map(cut_input, batch.inputs)
    content = tree_map(cut_other, batch.content)
    return replace(batch, inputs=inputs, content=content) if certain else None
