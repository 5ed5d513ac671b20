"""Response structures by themselves: linear in delta, zero at the start, norms without dense weights."""

import copy
import pickle

import pytest
import torch
from torch import nn

from stn_fx.rules.structure import (
    Exact,
    LowRank,
    LowRankResponse,
    Response,
    RowWiseResponse,
    RowWiseSumResponse,
    exact_change,
    row_scales,
    untouched_zeros,
)

STRUCTURES = {
    "row-wise": lambda: RowWiseResponse((4, 3, 2), 0, 5),
    "row-wise, axis 1": lambda: RowWiseResponse((4, 3, 2), 1, 5),
    "three terms": lambda: RowWiseSumResponse((4, 3, 2), 0, 5, 3),
    "three terms, axis 1": lambda: RowWiseSumResponse((4, 3, 2), 1, 5, 3),
    "low-rank": lambda: LowRankResponse((6, 3, 4), 0, 5, 2),
    "low-rank, axis 1": lambda: LowRankResponse((6, 5), 1, 5, 2),
    "exact": lambda: Exact((4, 3), 5),
    "exact, a number": lambda: Exact((), 5),
}


def made(name: str) -> Response:
    response = STRUCTURES[name]().double()
    response.initialise(torch.Generator().manual_seed(0))
    return response


def randomised(name: str) -> Response:
    response = made(name)
    with torch.no_grad():
        for p in response.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return response


@pytest.mark.parametrize("name", STRUCTURES)
def test_it_starts_at_zero_and_not_at_a_saddle(name: str) -> None:
    response, delta = made(name), torch.randn(5, dtype=torch.float64)
    change = response.dense(delta)
    assert change.shape == response.shape
    assert not change.any()
    (change * torch.randn(change.shape)).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in response.parameters()), "a saddle: nothing would move"


@pytest.mark.parametrize("name", STRUCTURES)
def test_it_is_linear_in_the_displacement(name: str) -> None:
    response = randomised(name)
    a, b = torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(response.dense(2 * a - 3 * b), 2 * response.dense(a) - 3 * response.dense(b))


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_norm_agrees_with_dense_weights(name: str) -> None:
    response, weight = randomised(name), torch.randn(STRUCTURES[name]().shape, dtype=torch.float64)
    delta_BH = torch.randn(7, 5, dtype=torch.float64)
    expected = torch.stack([(weight + response.dense(d)).square().sum() - weight.square().sum() for d in delta_BH])
    torch.testing.assert_close(response.squared_norm_change(weight, delta_BH), expected)


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_norm_has_the_gradient_of_dense_weights(name: str) -> None:
    response, weight = randomised(name), torch.randn(STRUCTURES[name]().shape, dtype=torch.float64, requires_grad=True)
    delta_BH = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    norms = response.squared_norm_change(weight, delta_BH)
    dense = torch.stack([(weight + response.dense(d)).square().sum() - weight.square().sum() for d in delta_BH])
    wanted = [weight, delta_BH, *response.parameters()]
    cotangent = torch.randn(7, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(norms, wanted, cotangent), torch.autograd.grad(dense, wanted, cotangent)
    )
    coefficient_B = torch.rand(7, dtype=torch.float64)
    value, add = response.penalize(weight.detach(), delta_BH.detach(), coefficient_B)
    torch.testing.assert_close(value, coefficient_B @ norms.detach())
    wanted = list(response.parameters())
    expected = torch.autograd.grad(response.squared_norm_change(weight, delta_BH), wanted, coefficient_B)
    add(1.0)
    torch.testing.assert_close([p.grad for p in wanted], list(expected))
    response.penalize(weight.detach(), delta_BH.detach(), coefficient_B)[1](2.0)  # adds to what is there
    torch.testing.assert_close([p.grad for p in wanted], [3 * g for g in expected])
    each = torch.func.vmap(lambda delta_H: response.squared_norm_change(weight, delta_H.unsqueeze(0))[0])(delta_BH)
    torch.testing.assert_close(each, norms)


def test_row_wise_scales_rows() -> None:
    response, delta = randomised("row-wise, axis 1"), torch.randn(5, dtype=torch.float64)
    scales = row_scales(response.V, delta.unsqueeze(0))[0]
    torch.testing.assert_close(response.dense(delta), response.U * scales.reshape(1, 3, 1))


def test_exact_changes_are_stacked() -> None:
    response, delta_BH = randomised("exact"), torch.randn(7, 5, dtype=torch.float64)
    stacked = exact_change(response.G, delta_BH)
    torch.testing.assert_close(stacked, torch.stack([response.dense(d) for d in delta_BH]))


def test_the_same_seed_gives_the_same_response_in_every_dtype() -> None:
    single, double = STRUCTURES["row-wise"](), STRUCTURES["row-wise"]().double()
    for response in (single, double):
        response.initialise(torch.Generator().manual_seed(3))
    torch.testing.assert_close(single.V.double(), double.V, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "8"])
def test_a_rank_that_is_no_positive_number_is_refused(rank: object) -> None:
    with pytest.raises(ValueError, match="positive whole number"):
        LowRank(rank)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_untouched_zeros_are_zeros_like_any(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        parameter = nn.Parameter(untouched_zeros((1030, 2, 517)))
    finally:
        torch.set_default_dtype(before)
    assert parameter.shape == (1030, 2, 517)
    assert parameter.dtype == dtype
    assert parameter.is_contiguous()
    assert parameter.data_ptr() % 64 == 0, "vector instructions read whole lines"
    assert not parameter.any()
    (parameter.sum() * 2).backward()
    torch.optim.SGD([parameter], lr=1.0).step()
    copies = [copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter)), parameter.detach().share_memory_()]
    assert all(bool((each == -2).all()) for each in copies)


def test_zeros_of_other_devices_and_small_ones_are_torchs() -> None:
    with torch.device("meta"):
        assert untouched_zeros((4096, 4096)).is_meta
    assert torch.equal(untouched_zeros((2, 3)), torch.zeros(2, 3))
    assert untouched_zeros((0, 3)).shape == (0, 3)


def test_several_terms_of_a_row_have_directions_of_their_own() -> None:
    response = made("three terms")
    directions_OTH = response.V.detach().transpose(0, 1)
    products_OTT = directions_OTH @ directions_OTH.transpose(1, 2)
    torch.testing.assert_close(products_OTT, (torch.eye(3, dtype=torch.float64) / 3).expand(4, 3, 3), atol=1e-6, rtol=0)
