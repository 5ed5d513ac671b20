"""Bijections between raw (unconstrained) and constrained hyperparameters.

The bounds alone decide the bijection:

- finite `high`:   value = low + (high - low) * sigmoid(raw)
- `high` infinite: value = low + exp(raw), for raw up to 80

Both are a logarithmic scale near the lower bound (for raw << 0, value - low is proportional to exp(raw)), which is why
a weight decay between 0 and 1 needs no transform of its own. Every value is finite in float32 for raw in [-50, 50],
and raw = -50 lies within 1e-20 * (high - low) of the lower bound.

Discrete hyperparameters are rounded after the bijection, as in STN (MacKay et al. 2019, arXiv 1903.03088),
with a straight-through derivative.

Shape suffixes: B examples, H hyperparameters.
"""

import math

import torch
from torch import Tensor

from stn_fx.errors import OutOfBoundsError

LARGEST_EXPONENT = 80.0
"""Of what has no upper bound: beyond, the exponential of float32 is infinite."""


def constrain(raw_BH: Tensor, low_H: Tensor, high_H: Tensor) -> Tensor:
    """Constrained values of raw ones, elementwise and differentiable, in the dtype of `raw_BH`.

    Args:
        raw_BH: raw values, any leading shape, last axis H.
        low_H: lower bounds, finite, in the dtype of `raw_BH`.
        high_H: upper bounds, above `low_H`; infinity where there is none.

    Returns:
        Values shaped like `raw_BH`, always within [low, high], and finite in float32, float64 and bfloat16.
    """
    closed_H = torch.isfinite(high_H)
    width_H = torch.where(closed_H, high_H - low_H, 1.0)
    # The exponential sees zeros in the columns of the sigmoid: an overflow would make their gradient 0 * inf = nan.
    above_BH = torch.exp(torch.where(closed_H, 0.0, raw_BH.clamp(max=LARGEST_EXPONENT)))
    value_BH = low_H + torch.where(closed_H, width_H * torch.sigmoid(raw_BH), above_BH)
    # low + (high - low) may exceed high by one rounding.
    return torch.clamp(value_BH, min=low_H, max=high_H)


def unconstrain(name: str, value: float, low: float, high: float) -> float:
    """Raw value whose constrained value is `value`: the inverse of `constrain`, for one number.

    Args:
        name: the hyperparameter, for the message.
        value: constrained value, strictly between the bounds.
        low: finite lower bound.
        high: upper bound, or infinity.

    Raises:
        OutOfBoundsError: `value` lies at a bound (its raw value would be infinite), outside, is NaN, or too large.
    """
    if not low < value < high or math.isinf(value):
        raise OutOfBoundsError(
            f"{name} = {value:g} is not strictly between its bounds {low:g} and {high:g}: a bound itself is reached "
            f"only at an infinite raw value. Choose a value inside, or set other bounds with low= and high=."
        )
    if math.isinf(high):
        if value - low > math.exp(LARGEST_EXPONENT):
            raise OutOfBoundsError(f"{name} = {value:g} is too large: values go up to exp({LARGEST_EXPONENT:g}).")
        return math.log(value - low)
    return math.log(value - low) - math.log(high - value)


def round_straight_through(values_BH: Tensor, discrete_H: Tensor) -> Tensor:
    """Columns with `discrete_H` true rounded to the nearest integer; the derivative is that of the identity.

    The sum is exact (the second term is zero in value), so a rounded value is an integer in every dtype. `detach` stops
    gradients and tangents alike, also inside torch.func transforms.
    """
    rounded_BH = torch.round(values_BH) + (values_BH - values_BH.detach())
    return torch.where(discrete_H, rounded_BH, values_BH)
