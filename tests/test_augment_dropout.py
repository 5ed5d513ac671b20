"""Per-example dropout masks: rates, exactness at the ends, and torch's own formulas."""

import pytest
import torch
import torch.nn.functional as F

from stn_fx.augment import (
    Draws,
    ReplayDraws,
    align,
    alpha_dropout_terms,
    channel_shape,
    dropout_multiplier,
    example_shape,
    input_dropout,
)
from stn_fx.errors import InputError

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def draws(seed=0):
    return Draws(torch.Generator().manual_seed(seed))


def rates(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_example_has_its_own_rate_and_scale(dtype):
    rate = rates(0.0, 0.01, 0.3, 0.5, 0.95, dtype=dtype)
    x = torch.ones(5, 200, 1000, dtype=dtype)
    multiplier = dropout_multiplier(x, align(rate, x), draws(), "d")
    assert multiplier.dtype == dtype
    assert multiplier.shape == x.shape
    for p, row in zip(rate, multiplier, strict=True):
        kept = row != 0
        assert (row[kept] == 1 / (1 - p)).all()
        tolerance = 5 * (p * (1 - p) / row.numel()).sqrt() + 2**-17
        assert abs(1 - kept.double().mean() - p) <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_rate_zero_keeps_everything_exactly(dtype):
    x = torch.ones(2, 100_000, dtype=dtype)
    for rate in (0.0, 1e-22):
        assert (dropout_multiplier(x, torch.full((2, 1), rate, dtype=dtype), draws(), "d") == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rate_one_drops_everything_and_high_rates_are_finite(dtype):
    x = torch.ones(4, 100_000, dtype=dtype)
    rate = rates(0.95, 0.9999, 1 - 2**-20, 1.0, dtype=dtype)
    multiplier = dropout_multiplier(x, align(rate, x), draws(), "d")
    assert torch.isfinite(multiplier).all()
    assert (multiplier[3] == 0).all()


def test_the_drop_is_exact_in_the_bits():
    """All 2**16 patterns once: the dropped share is the rate to 2**-17."""

    class AllPatterns(Draws):
        def bits(self, shape, like, name):
            return torch.arange(-(2**15), 2**15).to(torch.int16)

    x = torch.ones(2**16, dtype=torch.float64)
    for rate in (0.0, 1e-4, 0.1, 1 / 3, 0.5, 0.75, 0.95, 1 - 2**-15):
        kept = dropout_multiplier(x, torch.tensor(rate, dtype=torch.float64), AllPatterns(), "d", scale_by_keep=False)
        assert abs((1 - kept.mean()) - rate) <= 2**-17


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (1, 1, 1, 1), (2, 3, 5, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_shape(shape, dtype):
    x = torch.ones(shape, dtype=dtype)
    rate = torch.full((shape[0],), 0.3, dtype=dtype)
    assert dropout_multiplier(x, align(rate, x), draws(), "d").shape == shape
    assert all(term.shape == shape for term in alpha_dropout_terms(x, align(rate, x), draws(), "d"))


def test_batch_on_another_axis():
    x = torch.ones(50, 3, 400)
    multiplier = dropout_multiplier(x, align(rates(0.0, 0.5, 1.0), x, 1), draws(), "d")
    assert (multiplier[:, 0] == 1).all()
    assert 0.4 < (multiplier[:, 1] == 0).float().mean() < 0.6
    assert (multiplier[:, 2] == 0).all()


def test_channels_are_dropped_whole():
    x = torch.randn(4, 64, 3, 5)
    multiplier = dropout_multiplier(x, align(rates(0.5, 0.5, 0.2, 0.0), x), draws(), "d", channel_shape(x))
    assert multiplier.shape == (4, 64, 1, 1)
    assert 0 < (multiplier[0] == 0).sum() < 64
    assert (multiplier[3] == 1).all()


def test_drop_path_decides_for_whole_examples():
    x = torch.ones(2000, 2, 3)
    rate = torch.cat([torch.full((1000,), 0.2), torch.full((1000,), 0.6)])
    scaled = dropout_multiplier(x, align(rate, x), draws(), "d", example_shape(x))
    plain = dropout_multiplier(x, align(rate, x), draws(), "d", example_shape(x), scale_by_keep=False)
    assert scaled.shape == (2000, 1, 1)
    assert torch.equal(plain, (scaled != 0).float())
    assert abs((plain[:1000] == 0).float().mean() - 0.2) < 0.07
    assert abs((plain[1000:] == 0).float().mean() - 0.6) < 0.08
    assert example_shape(x, 1) == (1, 2, 1)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_alpha_dropout_is_torchs_for_each_value(p):
    """torch's own output takes, for each input, one of two values: both must be ours, dropped and kept."""
    torch.manual_seed(0)
    x = torch.linspace(-2, 2, 1000, dtype=torch.float64)
    multiplier, shift = alpha_dropout_terms(x, torch.tensor(p, dtype=torch.float64), draws(), "d")
    ours = x * multiplier + shift
    kept = multiplier != 0
    seen = [F.alpha_dropout(x, p, training=True) for _ in range(200)]
    distance = torch.stack([(ours - theirs).abs() for theirs in seen]).amin(0)
    assert distance.max() < 1e-12
    if 0 < p < 1:
        assert 0 < kept.sum() < 1000
        # A dropped element does not depend on x, in torch's as in ours.
        assert ours[~kept].std() < 1e-12
    if p == 0:
        assert torch.equal(ours, x)


def test_alpha_dropout_keeps_mean_and_variance_of_a_standard_input():
    x = torch.randn(3, 200_000, generator=torch.Generator().manual_seed(1))
    multiplier, shift = alpha_dropout_terms(x, align(rates(0.05, 0.3, 0.7), x), draws(), "d")
    y = x * multiplier + shift
    assert y.mean(1).abs().max() < 0.02
    assert (y.var(1) - 1).abs().max() < 0.03


def test_masks_carry_no_derivative_and_repeat_under_replay():
    rate = rates(0.3, 0.6).requires_grad_()
    x = torch.ones(2, 50, requires_grad=True)
    replay = ReplayDraws(torch.Generator().manual_seed(0))
    first, second = (dropout_multiplier(x, align(rate, x), replay, "d") for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    (x * first).sum().backward()
    assert torch.equal(x.grad, first)
    assert rate.grad is None


def test_vmap_over_rates():
    x = torch.ones(200)
    replay = ReplayDraws(torch.Generator().manual_seed(0))
    replay.bits((200,), x, "d")
    rate = rates(0.1, 0.5)
    together = torch.func.vmap(lambda p: dropout_multiplier(x, p, replay, "d"))(rate)
    apart = torch.stack([dropout_multiplier(x, p, replay, "d") for p in rate])
    assert torch.equal(together, apart)


def test_input_dropout():
    x = torch.randn(3, 2, 20, 20, generator=torch.Generator().manual_seed(1))
    replay = ReplayDraws(torch.Generator().manual_seed(0))
    rate = rates(0.0, 0.5, 0.25)
    y = input_dropout(x, rate, replay, "i")
    assert torch.equal(y, x * dropout_multiplier(x, align(rate, x), replay, "i"))
    assert torch.equal(y[0], x[0])
    assert input_dropout(x[:0], rate[:0], draws(), "i").shape == (0, 2, 20, 20)
    with pytest.raises(InputError, match="one value for each example"):
        input_dropout(x, rate[:2], draws(), "i")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_cuda_without_synchronising():
    x = torch.ones(4, 100_000, device="cuda")
    rate = rates(0.0, 0.2, 0.5, 0.9).cuda()
    source = Draws(torch.Generator("cuda").manual_seed(0))
    dropout_multiplier(x, align(rate, x), source, "d")
    torch.cuda.set_sync_debug_mode("error")
    try:
        multiplier = dropout_multiplier(x, align(rate, x), source, "d")
        alpha_dropout_terms(x, align(rate, x), source, "a")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close((multiplier == 0).float().mean(1), rate, rtol=0, atol=0.01)
