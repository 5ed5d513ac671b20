"""Per-example values in a shape that broadcasts against the tensor that they act on."""

from torch import Tensor

from stn_fx.errors import InputError


def align(values_B: Tensor, x: Tensor, batch_axis: int = 0) -> Tensor:
    """View of `values_B` (B,) with B on `batch_axis` of `x` and 1 on all other axes.

    Raises:
        InputError: `x` has no axis of that number, or it is not B long.
    """
    if not -x.ndim <= batch_axis < x.ndim or values_B.shape != (x.shape[batch_axis],):
        raise InputError(
            f"Values of shape {tuple(values_B.shape)} do not belong to axis {batch_axis} of a tensor of shape "
            f"{tuple(x.shape)}. Pass one value for each example, and the axis that holds the batch."
        )
    shape = [1] * x.ndim
    shape[batch_axis] = -1 if len(values_B) else 0
    return values_B.reshape(shape)
