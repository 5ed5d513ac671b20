"""Input dropout: element dropout on the input, with a rate of its own for every example (Srivastava et al. 2014)."""

from torch import Tensor

from stn_fx.augment.align import align
from stn_fx.augment.draws import Draws
from stn_fx.augment.dropout import dropout_multiplier


def input_dropout(x: Tensor, rate_B: Tensor, draws: Draws, name: str, batch_axis: int = 0) -> Tensor:
    """Input with elements dropped and the others scaled up, shaped like `x`.

    Args:
        x: floating input with B examples on `batch_axis`.
        rate_B: probabilities (B,) in [0, 1].
        draws: source of the random bits.
        name: what they are for, unique within one pass.
        batch_axis: the axis of `x` that holds the batch.

    Raises:
        InputError: `rate_B` does not have one value for each example.
    """
    return x * dropout_multiplier(x, align(rate_B, x, batch_axis), draws, name)
