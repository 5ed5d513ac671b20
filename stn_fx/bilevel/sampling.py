"""Where perturbed hyperparameters come from: one small class for each way in the papers, all with the same interface.

| class | inner step | outer step | source |
|---|---|---|---|
| `PerExample` | around the current value, each example on its own | the same | Delta-STN (Bae & Grosse 2020) |
| `PerGroup` | around the current value, each group of examples on its own | the same | for batch norms |
| `PerBatch` | around the current value, one draw for the whole batch | the same | STN (MacKay et al. 2019) |
| `GlobalSampling` | from one wide distribution for the whole run | at the current value | Lorraine & Duvenaud 2018 |

A hyperparameter with one value per batch has one draw for all examples in inner steps, whatever the others have; in the
response pass nothing acts on the batch, so that there each example may have its own.

Everything is drawn for the whole batch, also where several processes share it, and a process takes its own rows.
Shape suffixes: B examples, H hyperparameters.
"""

from abc import ABC, abstractmethod

import torch
from torch import Generator, Tensor

from stn_fx.arguments import require_count
from stn_fx.bilevel.replicas import Rows
from stn_fx.errors import InputError
from stn_fx.hparams import HyperparameterSpace

GROUP = 16


class Sampling(ABC):
    """Draws raw hyperparameters (B, H) for the passes that need perturbed ones.

    Attributes:
        uses_scales: whether the perturbations have the scales, so that these can be tuned.
        group: how many consecutive examples share a perturbation; None where batch norms are told of none.
        suits_batch_norms: whether examples that share the statistics of a batch norm share a perturbation.
    """

    uses_scales = True
    group: int | None = None
    suits_batch_norms = False

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}()"

    @abstractmethod
    def inner(self, space: HyperparameterSpace, rows: Rows, generator: Generator) -> Tensor:
        """For the linearized pass."""

    def outer(self, space: HyperparameterSpace, rows: Rows, generator: Generator) -> Tensor:
        """For the response pass, differentiable in `space.raw` (and in the scales, where they are tuned)."""
        return self.inner(space, rows, generator)

    def opposite(self, space: HyperparameterSpace, raw_BH: Tensor) -> Tensor:
        """What `inner` gives for the opposite noise."""
        return 2 * space.raw.detach() - raw_BH


class PerExample(Sampling):
    """Gaussian around the current value with the tuned scale, independent for every example."""

    def inner(self, space: HyperparameterSpace, rows: Rows, generator: Generator) -> Tensor:
        noise_BH = _shared_per_batch(self._noise(rows.total, space, generator), space)
        return space.perturb(noise_BH[rows.start : rows.stop])

    def outer(self, space: HyperparameterSpace, rows: Rows, generator: Generator) -> Tensor:
        return space.perturb(self._noise(rows.total, space, generator)[rows.start : rows.stop])

    def _noise(self, total: int, space: HyperparameterSpace, generator: Generator) -> Tensor:
        return _noise(total, space, generator)


class PerGroup(PerExample):
    """Gaussian around the current value with the tuned scale, one draw for every so many examples of a batch.

    For models whose batch norms take statistics of the batch in training. Such a norm undoes what is done to all
    examples alike, so that scaling the weights before it changes nothing; but among perturbations that differ from
    example to example every single one seems to be free to do so, and a response learned from them does. The examples
    of a group are perturbed alike, and the norms' statistics change for them as if the whole batch were. In outer steps
    too, where statistics follow the weights: else wide perturbations would seem to harm there, and scales collapse.

    Args:
        size: of a group. Fewer examples tell less of the statistics, more of them have fewer draws in a batch.
    """

    suits_batch_norms = True

    def __init__(self, size: int = GROUP) -> None:
        require_count("size", size)
        self.group = size

    def __repr__(self) -> str:
        return f"PerGroup(size={self.group})"

    def _noise(self, total: int, space: HyperparameterSpace, generator: Generator) -> Tensor:
        assert self.group is not None
        return _noise(-(-total // self.group), space, generator).repeat_interleave(self.group, 0)


class PerBatch(Sampling):
    """One Gaussian draw for all examples of a batch."""

    suits_batch_norms = True

    def inner(self, space: HyperparameterSpace, rows: Rows, generator: Generator) -> Tensor:
        return space.perturb(_noise(1, space, generator)).expand(rows.stop - rows.start, -1)


class GlobalSampling(Sampling):
    """Gaussian around the initial value with a fixed width, so that the response is learned everywhere at once.

    Each example has its own draw, also beside batch norms, which makes the response wrong there (see `PerGroup`); a
    warning says so.

    Args:
        width: standard deviation in raw space.
    """

    uses_scales = False

    def __init__(self, width: float = 1.5) -> None:
        if not width > 0:
            raise InputError(f"width={width}: it must be positive.")
        self.width = width

    def __repr__(self) -> str:
        return f"GlobalSampling(width={self.width})"

    def inner(self, space: HyperparameterSpace, rows: Rows, generator: Generator) -> Tensor:
        noise_BH = _shared_per_batch(_noise(rows.total, space, generator), space)
        return _initial(space) + self.width * noise_BH[rows.start : rows.stop]

    def opposite(self, space: HyperparameterSpace, raw_BH: Tensor) -> Tensor:
        return 2 * _initial(space) - raw_BH

    def outer(self, space: HyperparameterSpace, rows: Rows, generator: Generator) -> Tensor:
        return space.raw.expand(rows.stop - rows.start, -1)


def _initial(space: HyperparameterSpace) -> Tensor:
    return space.raw.new_tensor([each.raw_initial() for each in space.resolved])


def _noise(rows: int, space: HyperparameterSpace, generator: Generator) -> Tensor:
    return torch.randn(rows, len(space), generator=generator, dtype=space.raw.dtype, device=space.raw.device)


def _shared_per_batch(noise_BH: Tensor, space: HyperparameterSpace) -> Tensor:
    """The first row of the whole batch for hyperparameters with one value per batch."""
    if space.per_batch:
        noise_BH[:, space.per_batch] = noise_BH[:1, space.per_batch]
    return noise_BH
