"""Additive Gaussian noise and a random factor, with an own strength for every example; for any floating tensor."""

from torch import Tensor

from stn_fx.augment.align import align
from stn_fx.augment.draws import Draws


def scaled_noise(x: Tensor, std: Tensor, draws: Draws, name: str) -> Tensor:
    """Gaussian noise to add, shaped like `x`, in its dtype.

    Args:
        x: what it is added to; only its shape, dtype and device matter.
        std: standard deviations that broadcast against `x`, usually (B, 1, ..., 1); see `align`.
        draws: source of the random numbers.
        name: what they are for, unique within one pass.
    """
    noise = draws.normal(x.shape, x, name)
    return noise.mul_(std.detach().to(noise.dtype)).to(x.dtype)


def gaussian_noise(x: Tensor, std_B: Tensor, draws: Draws, name: str, batch_axis: int = 0) -> Tensor:
    """`x` plus Gaussian noise of an own standard deviation for every example, in the units of `x`."""
    return x + scaled_noise(x, align(std_B, x, batch_axis), draws, name)


def input_scale(x: Tensor, strength_B: Tensor, draws: Draws, name: str, batch_axis: int = 0) -> Tensor:
    """`x` times one factor for each example, uniform in 1 - strength to 1 + strength (STN, arXiv 1903.03088)."""
    unit_B = draws.uniform((x.shape[batch_axis],), x, name).mul_(2).sub_(1)
    factor_B = 1 + unit_B * strength_B.detach().to(unit_B.dtype)
    return x * align(factor_B.to(x.dtype), x, batch_axis)
