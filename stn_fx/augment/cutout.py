"""Cutout with a number of holes and a side length of its own for every example.

DeVries & Taylor 2017 (arXiv 1708.04552), as in the authors' code: the centre of a hole is a pixel of the image, the
hole reaches `length // 2` pixels to both sides (so an odd length acts like the even one below) and is clipped at the
border, and the image is multiplied by 0 there. Nothing waits for the device, and there is no loop over examples or
holes.

Shape suffixes: B examples, M holes at most, C channels, H and W pixels.
"""

import torch
from torch import Tensor

from stn_fx.augment.draws import Draws
from stn_fx.errors import InputError


def draw_centres(x_BCHW: Tensor, max_holes: int, draws: Draws, name: str) -> Tensor:
    """Centres (B, M, 2) of M = `max_holes` holes for each image: row and column as int32, each pixel equally likely.

    Args:
        x_BCHW: images; only shape, dtype and device matter.
        max_holes: the largest number of holes that any example can have (the hyperparameter's upper bound).
        draws: source of the random numbers.
        name: what they are for, unique within one pass.

    Raises:
        InputError: the input is not 4-d.
    """
    _check_images(x_BCHW)
    height, width = x_BCHW.shape[2:]
    position_BM2 = draws.uniform((x_BCHW.shape[0], max_holes, 2), x_BCHW, name)
    row_BM, column_BM = position_BM2.unbind(-1)
    # The largest u is 1 - 2**-24 (2**-53 in float64), and u * size then rounds to below size.
    rows_BM = (row_BM * height).to(torch.int32)
    columns_BM = (column_BM * width).to(torch.int32)
    return torch.stack((rows_BM, columns_BM), dim=-1)


def cutout(x_BCHW: Tensor, holes_B: Tensor, length_B: Tensor, centres_BM2: Tensor) -> Tensor:
    """Images with holes, shaped like `x_BCHW`, in its dtype.

    Args:
        x_BCHW: images with any number of channels, all of which a hole blanks.
        holes_B: number of holes, whole; what exceeds M counts as M.
        length_B: side length in pixels, whole.
        centres_BM2: row and column of each hole, from `draw_centres`.

    Raises:
        InputError: the input is not 4-d, or the parameters do not have one row for each image.
    """
    _check_images(x_BCHW)
    if holes_B.shape != x_BCHW.shape[:1] or length_B.shape != x_BCHW.shape[:1] or len(centres_BM2) != len(x_BCHW):
        raise InputError(
            f"Cutout needs parameters for each of {len(x_BCHW)} images, but holes have shape {tuple(holes_B.shape)}, "
            f"lengths {tuple(length_B.shape)} and centres {tuple(centres_BM2.shape)}. Pass (B,), (B,) and (B, M, 2)."
        )
    return x_BCHW * _keep(x_BCHW, holes_B.detach(), length_B.detach(), centres_BM2)


def _keep(x_BCHW: Tensor, holes_B: Tensor, length_B: Tensor, centres_BM2: Tensor) -> Tensor:
    """Mask (B, 1, H, W): 0 in holes, else 1."""
    device = x_BCHW.device
    half_B1 = (length_B / 2).floor().to(torch.int32)[:, None]
    # A hole that an example does not have gets an extent of nothing.
    exists_BM = torch.arange(centres_BM2.shape[1], device=device) < holes_B[:, None]

    def inside(centre_BM: Tensor, size: int) -> Tensor:
        position = torch.arange(size, dtype=torch.int32, device=device)
        start_BM, end_BM = centre_BM - half_B1, centre_BM + half_B1
        inside_BMS = (position >= start_BM[..., None]) & (position < end_BM[..., None])
        return (inside_BMS & exists_BM[..., None]).float()

    rows_BMH = inside(centres_BM2[..., 0], x_BCHW.shape[2])
    columns_BMW = inside(centres_BM2[..., 1], x_BCHW.shape[3])
    # A product of matrices counts the holes over each pixel without the (B, M, H, W) tensor.
    count_BHW = rows_BMH.transpose(1, 2) @ columns_BMW
    return (count_BHW == 0).to(x_BCHW.dtype)[:, None]


def _check_images(x_BCHW: Tensor) -> None:
    if x_BCHW.ndim != 4:
        raise InputError(
            f"Cutout works on images of shape (B, C, H, W), but the input has shape {tuple(x_BCHW.shape)}. Leave "
            f"cutout out for this model."
        )
