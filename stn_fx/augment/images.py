"""What all augmentations of images share: checks, precision, and numbers that are symmetric around zero."""

from collections.abc import Callable

import torch
from torch import Tensor

from stn_fx.augment.draws import Draws
from stn_fx.errors import InputError

# On CPU so many numbers for each thread at a time: with what is made of them, they stay in the cache of a core.
CACHED = 2**18


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


def piece_by_piece(change: Callable[..., Tensor], x_BCHW: Tensor, *values_B: Tensor | None) -> Tensor:
    """`change(x_BCHW, *values_B)`, on CPU for a few images at a time.

    What lies between the passes of `change` over the images stays in the cache then, and new memory, which takes as
    long as a pass itself, is asked for once. Each piece has an image or more for every thread.

    Args:
        change: from images and the values of each to images of the same shape and dtype; what it is given as `out` it
            writes them into.
        x_BCHW: images.
        values_B: tensors with one entry for every image on axis 0, or None.
    """
    images = max(1, CACHED // max(1, x_BCHW[:1].numel())) * torch.get_num_threads()
    # Autograd cannot follow what is written into the result.
    traced = any(each is not None and each.requires_grad for each in (x_BCHW, *values_B))
    if x_BCHW.device.type != "cpu" or traced or images >= len(x_BCHW):
        return change(x_BCHW, *values_B)
    result = torch.empty_like(x_BCHW)
    for start in range(0, len(x_BCHW), images):
        span = slice(start, start + images)
        part_B = (None if value_B is None else value_B[span] for value_B in values_B)
        change(x_BCHW[span], *part_B, out=result[span])
    return result


def where_active(active_B: Tensor, change: Callable[[Tensor], Tensor], x: Tensor, out: Tensor | None = None) -> Tensor:
    """`change(x)` for the examples that have something to change, `x` bit by bit for the others, in its dtype.

    It is written into `out` where that is given.
    """
    # Only here is it free to ask: a GPU would be waited for, a compiler would break its graph, and fake tensors (by
    # which costs are predicted) cannot tell.
    known = type(active_B) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and active_B.all():
        changed = change(working(x)).to(x.dtype)
        return changed if out is None else out.copy_(changed)
    # lerp is exact at weights 0 and 1, and four times as fast on CPU as torch.where.
    return torch.lerp(x, change(working(x)).to(x.dtype), example_by_example(x, active_B), out=out)
