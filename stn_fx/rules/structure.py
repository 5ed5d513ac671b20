"""How a parameter responds to the hyperparameters: the structures of DeltaW(delta), linear in delta.

Source: MacKay et al. 2019 (STN), section 3.2, and Bae & Grosse 2020 (Delta-STN), section 3: row-wise
``DeltaW_i = diag(V delta_i) U``.  ``V`` and ``G`` start at zero, so that a compiled model starts exactly as the user's;
``U``, ``A`` and ``B`` start as a layer's own weights would (all zero would be a saddle).

Shapes: O rows (outputs), H hyperparameters, B examples, r rank; "row axis" is the axis of the parameter that is scaled.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stn_fx.errors import InputError


@dataclass(frozen=True)
class LowRank:
    """Response of rank ``rank``: ``DeltaW_i = A diag(V delta_i) B``, nearly free in time and memory.

    Weights for which it would not be smaller than the row-wise response (few outputs, depthwise convolutions) get the
    row-wise one; the report says which.
    """

    rank: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise InputError(f"LowRank({self.rank!r}): the rank must be a positive whole number, as in LowRank(8).")


class Response(nn.Module):
    """Response of one parameter; knows its shape, so that dense weights and norms follow from the structure alone."""

    kind: str

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def initialise(self, weight: Tensor, generator: torch.Generator) -> None:
        """Draw initial values (on the CPU) for a response of this weight; DeltaW is zero with them."""
        raise NotImplementedError

    def silence(self, row: int) -> None:
        """Keep DeltaW zero at this index of the parameter's axis 0, which no gradient reaches."""
        raise NotImplementedError

    def dense(self, delta: Tensor) -> Tensor:
        """DeltaW for one displacement (H,), shaped like the parameter: the bridge to every oracle."""
        raise NotImplementedError

    def squared_norm_change(self, weight: Tensor, delta_BH: Tensor) -> Tensor:
        """``|w + DeltaW_i|^2 - |w|^2`` for every example, (B,), without forming per-example weights."""
        raise NotImplementedError

    def inner_product(self, direction: Tensor, delta_BH: Tensor) -> Tensor:
        """``<direction, DeltaW_i>`` for every example, (B,), without forming per-example weights."""
        raise NotImplementedError


class RowWise(Response):
    """``DeltaW_i = diag(V delta_i) U`` along ``row_axis``; ``U`` shaped like W, ``V`` (O, H)."""

    kind = "row-wise"

    def __init__(self, shape: tuple[int, ...], row_axis: int, hyperparameters: int) -> None:
        super().__init__(shape)
        self.row_axis = row_axis
        self.U = nn.Parameter(torch.empty(self.shape))
        self.V = nn.Parameter(torch.zeros(self.shape[row_axis], hyperparameters))

    def initialise(self, weight: Tensor, generator: torch.Generator) -> None:
        """Draw ``U`` as ``nn.Linear`` and ``nn.Conv`` draw their weights: uniform within 1/sqrt(fan in)."""
        fan_in = max(1, weight.numel() // max(1, weight.shape[self.row_axis]))
        _uniform(self.U, 1 / math.sqrt(fan_in), generator)

    @torch.no_grad()
    def silence(self, row: int) -> None:
        self.U[row] = 0

    def dense(self, delta: Tensor) -> Tensor:
        scales = self.V @ delta
        return self.U * scales.reshape([-1 if a == self.row_axis else 1 for a in range(len(self.shape))])

    def squared_norm_change(self, weight: Tensor, delta_BH: Tensor) -> Tensor:
        scales_BO = delta_BH @ self.V.t()
        square_O = self.U.square().sum(self._others())
        return 2 * self.inner_product(weight, delta_BH) + scales_BO.square() @ square_O

    def inner_product(self, direction: Tensor, delta_BH: Tensor) -> Tensor:
        return delta_BH @ self.V.t() @ (direction * self.U).sum(self._others())

    def _others(self) -> list[int]:
        return [a for a in range(len(self.shape)) if a != self.row_axis]


class LowRankResponse(Response):
    """``DeltaW_i = A diag(V delta_i) B``: A (O, r), B (r, the other axes of W), V (r, H); rows along ``row_axis``."""

    kind = "low-rank"

    def __init__(self, shape: tuple[int, ...], row_axis: int, hyperparameters: int, rank: int) -> None:
        super().__init__(shape)
        self.row_axis, self.rank = row_axis, rank
        rest = [n for a, n in enumerate(self.shape) if a != row_axis]
        self.A = nn.Parameter(torch.empty(self.shape[row_axis], rank))
        self.B = nn.Parameter(torch.empty(rank, *rest))
        self.V = nn.Parameter(torch.zeros(rank, hyperparameters))

    def initialise(self, weight: Tensor, generator: torch.Generator) -> None:
        """Draw ``B`` as a layer over the same inputs and ``A`` as a layer over ``rank`` inputs."""
        fan_in = max(1, weight.numel() // max(1, weight.shape[self.row_axis]))
        _uniform(self.B, 1 / math.sqrt(fan_in), generator)
        _uniform(self.A, 1 / math.sqrt(self.rank), generator)

    @torch.no_grad()
    def silence(self, row: int) -> None:
        if self.row_axis == 0:
            self.A[row] = 0
        else:
            self.B[:, row] = 0

    def dense(self, delta: Tensor) -> Tensor:
        scales = self.V @ delta
        return torch.tensordot(self.A * scales, self.B, dims=1).movedim(0, self.row_axis)

    def squared_norm_change(self, weight: Tensor, delta_BH: Tensor) -> Tensor:
        scales_Br = delta_BH @ self.V.t()
        flat = self.B.flatten(1)
        gram_rr = (self.A.t() @ self.A) * (flat @ flat.t())
        return 2 * self.inner_product(weight, delta_BH) + ((scales_Br @ gram_rr) * scales_Br).sum(1)

    def inner_product(self, direction: Tensor, delta_BH: Tensor) -> Tensor:
        rows = direction.movedim(self.row_axis, 0).flatten(1)
        return delta_BH @ self.V.t() @ ((self.A.t() @ rows) * self.B.flatten(1)).sum(1)


class Exact(Response):
    """``Delta g_i = G delta_i`` with the full Jacobian G (*shape, H): biases, norms and other small parameters."""

    kind = "exact"

    def __init__(self, shape: tuple[int, ...], hyperparameters: int) -> None:
        super().__init__(shape)
        self.G = nn.Parameter(torch.zeros(*self.shape, hyperparameters))

    def initialise(self, weight: Tensor, generator: torch.Generator) -> None:
        """Nothing to draw: G starts at zero and receives a gradient there."""

    def silence(self, row: int) -> None:
        """Nothing to do: G stays zero where no gradient comes."""

    def dense(self, delta: Tensor) -> Tensor:
        return self.G @ delta

    def squared_norm_change(self, weight: Tensor, delta_BH: Tensor) -> Tensor:
        jacobian = self._jacobian()
        gram_HH = jacobian.t() @ jacobian
        return 2 * self.inner_product(weight, delta_BH) + ((delta_BH @ gram_HH) * delta_BH).sum(1)

    def inner_product(self, direction: Tensor, delta_BH: Tensor) -> Tensor:
        return delta_BH @ (direction.flatten() @ self._jacobian())

    def _jacobian(self) -> Tensor:
        return self.G.flatten(0, -2) if self.G.ndim > 1 else self.G.unsqueeze(0)


def row_scales(V: Tensor, delta_BH: Tensor) -> Tensor:
    """``V delta_i`` for every example: (B, O), or (B, r) for the low-rank response."""
    return delta_BH @ V.t()


def exact_change(G: Tensor, delta_BH: Tensor) -> Tensor:
    """``G delta_i`` for every example: the stack (B, *shape)."""
    change = delta_BH @ G.reshape(-1, G.shape[-1]).t()
    return change.reshape(delta_BH.shape[0], *G.shape[:-1])


def _uniform(parameter: nn.Parameter, bound: float, generator: torch.Generator) -> None:
    # Drawn on the CPU in float32, so that a seed gives the same response on every device and in every dtype.
    draws = torch.rand(parameter.shape, generator=generator) * 2 - 1
    with torch.no_grad():
        parameter.copy_(draws * bound)
