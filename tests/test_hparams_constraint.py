"""Bijections: finite, inside the bounds, inverse to each other, differentiable."""

import math

import pytest
import torch

from stn_fx.errors import OutOfBoundsError
from stn_fx.hparams.constraint import constrain, round_straight_through, unconstrain

# In (0.17, 0.46), low + (high - low) exceeds high, in float32 and in float64.
BOUNDS = [(0.0, 0.95), (0.0, 1.0), (0.17, 0.46), (-0.5, 0.5), (2.0, 16.0), (0.0, math.inf), (1e-3, math.inf)]


def columns(dtype):
    low, high = zip(*BOUNDS, strict=True)
    return torch.tensor(low, dtype=dtype), torch.tensor(high, dtype=dtype)


@pytest.mark.parametrize("reach", [50, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_finite_and_within_bounds(dtype, reach):
    low, high = columns(dtype)
    raw = torch.linspace(-reach, reach, 1001).to(dtype)[:, None].expand(-1, len(BOUNDS)).clone().requires_grad_()
    values = constrain(raw, low, high)
    assert values.dtype == dtype
    assert torch.isfinite(values).all()
    assert (values >= low).all()
    assert (values <= high).all()
    assert (values.detach().diff(dim=0) >= 0).all()
    values.sum().backward()
    assert torch.isfinite(raw.grad).all()


def test_an_unbounded_column_does_not_poison_the_gradient_of_others():
    raw = torch.tensor([200.0, 0.0], requires_grad=True)
    constrain(raw, torch.zeros(2), torch.tensor([1.0, math.inf])).sum().backward()
    assert raw.grad.tolist() == [0.0, 1.0]


def test_far_below_is_the_lower_bound():
    low, high = columns(torch.float32)
    values = constrain(torch.full((len(BOUNDS),), -50.0), low, high)
    assert (values - low < 1e-15).all()


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_inverse(low, high):
    width = min(high - low, 100.0)
    for fraction in (1e-6, 0.01, 0.3, 0.9, 0.999):
        value = low + fraction * width
        raw = unconstrain("h", value, low, high)
        bounds = torch.tensor([low, high], dtype=torch.float64)
        again = constrain(torch.tensor(raw, dtype=torch.float64), bounds[0], bounds[1])
        torch.testing.assert_close(again.item(), value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("value", [0.0, 0.95, -0.1, 1.0, math.nan, math.inf])
def test_bounds_and_beyond_are_refused_with_the_bounds(value):
    with pytest.raises(OutOfBoundsError, match=r"rate = .* 0 and 0\.95"):
        unconstrain("rate", value, 0.0, 0.95)


def test_infinity_is_refused_without_an_upper_bound():
    with pytest.raises(OutOfBoundsError):
        unconstrain("h", math.inf, 0.0, math.inf)


def test_gradient_agrees_with_finite_differences():
    low, high = columns(torch.float64)
    raw = torch.randn(4, len(BOUNDS), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda r: constrain(r, low, high), raw.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_exact_and_passes_the_gradient(dtype):
    values = torch.rand(1000, 2, dtype=dtype, generator=torch.Generator().manual_seed(0)).mul_(30).requires_grad_()
    rounded = round_straight_through(values, torch.tensor([True, False]))
    torch.testing.assert_close(rounded[:, 0], values[:, 0].round(), rtol=0, atol=0)
    torch.testing.assert_close(rounded[:, 1], values[:, 1], rtol=0, atol=0)
    rounded.sum().backward()
    assert (values.grad == 1).all()


def test_a_value_that_no_raw_value_gives_is_refused():
    assert unconstrain("weight_decay", math.exp(79.0), 0.0, math.inf) == pytest.approx(79.0)
    with pytest.raises(OutOfBoundsError, match="too large"):
        unconstrain("weight_decay", 1e36, 0.0, math.inf)
