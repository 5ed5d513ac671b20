"""How a parameter responds to the hyperparameters: the structures of DeltaW(delta), linear in delta.

Source: MacKay et al. 2019 (STN), section 3.2, and Bae & Grosse 2020 (Delta-STN), section 3: row-wise
``DeltaW_i = diag(V delta_i) U``.  ``U``, ``B`` and ``G`` start at zero, so that a compiled model starts exactly as the
user's, and ``V`` and ``A`` at random (all zero would be a saddle).  The papers' code does it the other way round, ``V``
at zero and ``U`` drawn as a layer's weights.  Then the response first moves along the random ``U``, which itself
learns only as fast as ``V`` is large: on ridge regression (5 seeds, from below and from above) tuning ran away to a
bound in 4 of 10 runs, this way round in 1.

Shapes: O rows, H hyperparameters, B examples, r rank; "row axis" is the axis of the parameter that is scaled. Of a
matrix it is the longer one, outputs or inputs: each row moves along one direction for all hyperparameters, so the more
rows, the more directions (hypergradients of a perceptron agree with retrained runs to 0.77 instead of 0.60,
``examples/benchmarks/results/README.md``; the papers scale outputs).
"""

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stn_fx.arguments import require_count
from stn_fx.errors import InputError

Addition = Callable[[float], None]

LARGE_BYTES = 1 << 20
"""Of zeros that are worth memory pages of their own."""
CHUNK = 1 << 18
"""Elements of a product that the CPU's cache holds."""


@dataclass(frozen=True)
class RowWise:
    """Sum of row-wise responses, ``DeltaW_i = sum_t diag(V_t delta_i) U_t``: each row moves in ``terms`` directions.

    With one term, the papers' response, all hyperparameters move a row along one direction; with as many terms as there
    are hyperparameters, the most that are made, it can be any Jacobian. Each term has the memory of the
    weights and, in the linearized and the response pass, one more product with them. The weights of recurrent networks
    have one term; the report says which.

    The rows of a matrix are those of its longer side: its outputs, or its inputs where it has more of them, which costs
    one product more in the backward pass of the linearized one.
    """

    terms: int = 1

    def __post_init__(self) -> None:
        require_count("terms", self.terms)


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

    def initialise(self, generator: torch.Generator) -> None:
        """Draw initial values (on the CPU); DeltaW is zero with them, and a gradient reaches the parameters."""
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

    def penalize(self, weight: Tensor, delta_BH: Tensor, coefficient_B: Tensor) -> tuple[Tensor, Addition]:
        """``sum_i c_i (|w + DeltaW_i|^2 - |w|^2)``, and what adds its gradient times a factor to ``.grad``."""
        with torch.enable_grad():
            value = coefficient_B @ self.squared_norm_change(weight, delta_BH)

        def add(factor: float) -> None:
            (factor * value).backward(inputs=list(self.parameters()))

        return value.detach(), add

    def inner_product(self, direction: Tensor, delta_BH: Tensor) -> Tensor:
        """``<direction, DeltaW_i>`` for every example, (B,), without forming per-example weights."""
        raise NotImplementedError


class RowWiseResponse(Response):
    """``DeltaW_i = diag(V delta_i) U`` along ``row_axis``; ``U`` shaped like W, ``V`` (O, H)."""

    kind = "row-wise"

    def __init__(self, shape: tuple[int, ...], row_axis: int, hyperparameters: int) -> None:
        super().__init__(shape)
        self.row_axis = row_axis
        self.U = nn.Parameter(untouched_zeros(self.shape))
        self.V = nn.Parameter(torch.empty(self.shape[row_axis], hyperparameters))

    def initialise(self, generator: torch.Generator) -> None:
        """Draw ``V``: random signs, so that every row follows every hyperparameter from the first update on."""
        _random_signs(self.V, generator)

    def silence(self, row: int) -> None:
        """Nothing to do: U stays zero where no gradient comes."""

    def dense(self, delta: Tensor) -> Tensor:
        scales = self.V @ delta
        return self.U * scales.reshape([-1 if a == self.row_axis else 1 for a in range(len(self.shape))])

    def squared_norm_change(self, weight: Tensor, delta_BH: Tensor) -> Tensor:
        scales_BO = delta_BH @ self.V.t()
        U_OF = self._rows(self.U)
        return 2 * self.inner_product(weight, delta_BH) + scales_BO.square() @ torch.linalg.vecdot(U_OF, U_OF)

    def inner_product(self, direction: Tensor, delta_BH: Tensor) -> Tensor:
        return delta_BH @ self.V.t() @ torch.linalg.vecdot(self._rows(direction), self._rows(self.U))

    @torch.no_grad()
    def penalize(self, weight: Tensor, delta_BH: Tensor, coefficient_B: Tensor) -> tuple[Tensor, Addition]:
        U_OF, w_OF, scales_BO = self._rows(self.U), self._rows(weight), delta_BH @ self.V.t()
        inner_O, square_O = _row_products(w_OF, U_OF), _row_products(U_OF, U_OF)
        first_O, second_O = 2 * coefficient_B @ scales_BO, coefficient_B @ scales_BO.square()

        @torch.no_grad()
        def add(factor: float) -> None:
            gradient_OF = gradient_of(self.U).movedim(self.row_axis, 0)
            by_row = [-1] + [1] * (gradient_OF.ndim - 1)
            gradient_OF.addcmul_(weight.movedim(self.row_axis, 0), (factor * first_O).reshape(by_row))
            gradient_OF.addcmul_(self.U.movedim(self.row_axis, 0), (2 * factor * second_O).reshape(by_row))
            slope_BO = 2 * factor * coefficient_B.unsqueeze(1) * (inner_O + scales_BO * square_O)
            gradient_of(self.V).add_(slope_BO.t() @ delta_BH)

        return first_O @ inner_O + second_O @ square_O, add

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(self.row_axis, 0).flatten(1)


class RowWiseSumResponse(Response):
    """``DeltaW_i = sum_t diag(V_t delta_i) U_t`` along ``row_axis``; ``U`` (terms, shape of W), ``V`` (terms, O, H).

    There are H terms at most: more have no directions of their own.
    """

    kind = "row-wise"

    def __init__(self, shape: tuple[int, ...], row_axis: int, hyperparameters: int, terms: int) -> None:
        super().__init__(shape)
        self.row_axis = row_axis
        self.U = nn.Parameter(untouched_zeros((terms, *self.shape)))
        self.V = nn.Parameter(torch.empty(terms, self.shape[row_axis], hyperparameters))

    def initialise(self, generator: torch.Generator) -> None:
        """Draw ``V``: for each row orthogonal directions; parallel terms would stay copies of each other for ever."""
        terms, rows, hyperparameters = self.V.shape
        # On the CPU in float32, as everything that is drawn.
        drawn_OHT = torch.randn(rows, hyperparameters, terms, generator=generator, device="cpu", dtype=torch.float32)
        directions_OHT = torch.linalg.qr(drawn_OHT)[0] / math.sqrt(terms)
        with torch.no_grad():
            self.V.copy_(directions_OHT.permute(2, 0, 1))

    def silence(self, row: int) -> None:
        """Nothing to do: U stays zero where no gradient comes."""

    def dense(self, delta: Tensor) -> Tensor:
        scales_TO = self.V @ delta
        rows = [-1 if a == self.row_axis else 1 for a in range(len(self.shape))]
        return (self.U * scales_TO.reshape(len(scales_TO), *rows)).sum(0)

    def squared_norm_change(self, weight: Tensor, delta_BH: Tensor) -> Tensor:
        scales_BOT, U_OTF = self._scales(delta_BH), self._rows()
        gram_OTT = U_OTF @ U_OTF.transpose(1, 2)
        squares_B = torch.einsum("bot,ots,bos->b", scales_BOT, gram_OTT, scales_BOT)
        return 2 * self.inner_product(weight, delta_BH) + squares_B

    def inner_product(self, direction: Tensor, delta_BH: Tensor) -> Tensor:
        direction_OF = direction.movedim(self.row_axis, 0).flatten(1)
        products_OT = torch.einsum("of,otf->ot", direction_OF, self._rows())
        return self._scales(delta_BH).flatten(1) @ products_OT.flatten()

    def _scales(self, delta_BH: Tensor) -> Tensor:
        return torch.einsum("bh,toh->bot", delta_BH, self.V)

    def _rows(self) -> Tensor:
        """``U`` as (O, terms, F)."""
        return self.U.movedim(1 + self.row_axis, 0).flatten(2)


class LowRankResponse(Response):
    """``DeltaW_i = A diag(V delta_i) B``: A (O, r), B (r, the other axes of W), V (r, H); rows along ``row_axis``."""

    kind = "low-rank"

    def __init__(self, shape: tuple[int, ...], row_axis: int, hyperparameters: int, rank: int) -> None:
        super().__init__(shape)
        self.row_axis, self.rank = row_axis, rank
        rest = [n for a, n in enumerate(self.shape) if a != row_axis]
        self.A = nn.Parameter(torch.empty(self.shape[row_axis], rank))
        self.B = nn.Parameter(torch.zeros(rank, *rest))
        self.V = nn.Parameter(torch.empty(rank, hyperparameters))

    def initialise(self, generator: torch.Generator) -> None:
        """Draw ``A`` as a layer over ``rank`` inputs, and ``V`` as the row-wise response does."""
        _uniform(self.A, 1 / math.sqrt(self.rank), generator)
        _random_signs(self.V, generator)

    @torch.no_grad()
    def silence(self, row: int) -> None:
        if self.row_axis == 0:  # else it is a row of B, which starts at zero and receives no gradient
            self.A[row] = 0

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

    def initialise(self, generator: torch.Generator) -> None:
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


def untouched_zeros(shape: tuple[int, ...]) -> Tensor:
    """``torch.zeros(shape)``; on the CPU, memory of a large one is taken when it is first written.

    ``U`` is as large as the model: writing its zeros would take longer than the rest of a conversion, and memory that a
    model which is only reported on never needs.
    """
    like = torch.empty(0)  # of the device and dtype that are set
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < LARGE_BYTES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(shape)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)


def square_norm(weight: Tensor) -> Tensor:
    """``|w|^2`` in one pass over the weight, and one in the backward; a sum of squares would write them first."""
    return torch.linalg.vector_norm(weight).square()


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """The gradient to add to in place; zero where there is none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _row_products(a_OF: Tensor, b_OF: Tensor) -> Tensor:
    """Inner products (O,) of the rows; on the CPU in parts, as `vecdot` writes the products of all elements first."""
    rows = max(1, CHUNK // max(1, a_OF.shape[1]))
    if a_OF.device.type != "cpu" or rows >= len(a_OF):
        return torch.linalg.vecdot(a_OF, b_OF)
    return torch.cat([torch.linalg.vecdot(a, b) for a, b in zip(a_OF.split(rows), b_OF.split(rows), strict=True)])


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


def _random_signs(parameter: nn.Parameter, generator: torch.Generator) -> None:
    # +-1 / sqrt(H): the spread of a row's ``V delta`` is that of one displacement, however many there are.
    signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2.0 - 1.0
    with torch.no_grad():
        parameter.copy_(signs / math.sqrt(max(1, parameter.shape[-1])))
