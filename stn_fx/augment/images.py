"""What all augmentations of images share: checks, precision, and numbers that are symmetric around zero."""

from collections.abc import Callable

import torch
from torch import Tensor

from stn_fx.augment.draws import Draws
from stn_fx.errors import InputError


def check_images(x_BCHW: Tensor, what: str) -> None:
    """InputError unless the input is a batch of images."""
    if x_BCHW.ndim != 4:
        raise InputError(
            f"{what} works on images of shape (B, C, H, W), but the input has shape {tuple(x_BCHW.shape)}. Leave it "
            f"out for this model, or name another input with @."
        )


def check_per_example(x: Tensor, what: str, **values_B: Tensor | None) -> None:
    """InputError unless each of the values that are given has one entry for every example."""
    for name, value_B in values_B.items():
        if value_B is not None and value_B.shape != x.shape[:1]:
            raise InputError(
                f"{what}: {name} has shape {tuple(value_B.shape)} for {len(x)} examples. Pass one value for each, (B,)."
            )


def working(x: Tensor) -> Tensor:
    """`x` in the precision to compute in: float64 as it is, everything else in float32 (bfloat16 has 8 bits)."""
    return x if x.dtype == torch.float64 else x.float()


def symmetric(strength_B: Tensor, like: Tensor, draws: Draws, name: str) -> Tensor:
    """Numbers uniform in [-strength, strength) for each example, in the precision to compute in."""
    unit_B = draws.uniform((like.shape[0],), like, name).mul_(2).sub_(1)
    return unit_B * strength_B.detach().to(unit_B.dtype)


def example_by_example(x: Tensor, values_B: Tensor) -> Tensor:
    """View of `values_B` that broadcasts against images (B, C, H, W), in the dtype of `x`."""
    return values_B.to(x.dtype).reshape(-1, 1, 1, 1)


def where_active(active_B: Tensor, change: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`change(x)` for the examples that have something to change, `x` bit by bit for the others, in its dtype."""
    # lerp is exact at weights 0 and 1, and four times as fast on CPU as torch.where.
    return torch.lerp(x, change(working(x)).to(x.dtype), example_by_example(x, active_B))
