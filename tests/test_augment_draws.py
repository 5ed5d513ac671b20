"""Sources of random numbers: reproducible, uniform, replayable."""

import pytest
import torch

from stn_fx.augment import Draws, ReplayDraws
from stn_fx.errors import InputError

X = torch.zeros(3, 5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["uniform", "bits"])
def test_reproducible_from_the_generator_alone(kind):
    state = torch.get_rng_state()
    one, same, other = (getattr(Draws(seeded(seed)), kind)((7, 3), X, "x") for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_global_generator_is_the_default():
    torch.manual_seed(5)
    one = Draws().bits((4,), X, "x")
    torch.manual_seed(5)
    assert torch.equal(Draws().bits((4,), X, "x"), one)


@pytest.mark.parametrize(
    ("like", "dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float32),
    ],
)
def test_dtype_of_uniform_numbers(like, dtype):
    numbers = Draws(seeded()).uniform((1000,), X.to(like), "x")
    assert numbers.dtype == dtype
    assert (numbers >= 0).all()
    assert (numbers < 1).all()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (5, 0), (7, 3), (2, 3, 5)])
def test_bits_take_any_shape(shape):
    bits = Draws(seeded()).bits(shape, X, "x")
    assert bits.shape == shape
    assert bits.dtype == torch.int16


def test_every_bit_is_fair_and_independent_of_the_others():
    bits = Draws(seeded()).bits((4 * 50_000,), X, "x").to(torch.int32) & 0xFFFF
    # All 64 bits of a word, as columns.
    planes = torch.stack([(bits >> k) & 1 for k in range(16)], 1).reshape(50_000, 64).double()
    assert (planes.mean(0) - 0.5).abs().max() < 5 * 0.5 / 50_000**0.5
    correlation = torch.corrcoef(planes.T) - torch.eye(64, dtype=torch.float64)
    assert correlation.abs().max() < 5.5 / 50_000**0.5


def test_replay():
    draws = ReplayDraws(seeded())
    first = {name: (draws.uniform((4, 2), X, name), draws.bits((4, 2), X, name)) for name in "ab"}
    assert not torch.equal(first["a"][0], first["b"][0])
    for name in "ba":
        assert torch.equal(draws.bits((4, 2), X, name), first[name][1])
        assert torch.equal(draws.uniform((4, 2), X, name), first[name][0])


def test_replay_of_gamma_and_permutations():
    draws, like = ReplayDraws(seeded()), torch.empty(0)
    concentration = torch.tensor([0.3, 2.0, 7.0])
    assert torch.equal(draws.gamma(concentration, like, "a"), draws.gamma(concentration, like, "a"))
    assert not torch.equal(draws.gamma(concentration, like, "a"), draws.gamma(concentration, like, "b"))
    assert torch.equal(draws.permutation(50, like, "a"), draws.permutation(50, like, "a"))
    assert not torch.equal(draws.permutation(50, like, "a"), draws.permutation(50, like, "b"))
    for again in (lambda: draws.gamma(torch.ones(2), like, "a"), lambda: draws.permutation(3, like, "a")):
        with pytest.raises(InputError, match="were recorded with shape"):
            again()


def test_what_is_replayed_can_be_written_to():
    draws = ReplayDraws(seeded())
    first = draws.uniform((4,), X, "a")
    expected = first.clone()
    first.zero_()
    assert torch.equal(draws.uniform((4,), X, "a"), expected)


def test_replay_refuses_another_shape():
    draws = ReplayDraws(seeded())
    draws.bits((4, 2), X, "site")
    with pytest.raises(InputError, match=r"'site' were recorded with shape \(4, 2\)"):
        draws.bits((4, 3), X, "site")


def test_a_generator_of_another_device_is_refused():
    with pytest.raises(InputError, match="'site'"):
        Draws(seeded()).bits((2,), X.to("meta"), "site")
