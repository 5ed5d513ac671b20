"""Random erasing with own probability and size for every image (Zhong et al. 2017, arXiv 1708.04896).

One rectangle at most: its share of the image is uniform up to the given one, its aspect log-uniform in 0.3 to 1 / 0.3
as in torchvision's `RandomErasing`, and it is cut to the image (torchvision draws again instead). It is filled with 0.

Shape suffixes: B examples, C channels, H and W pixels.
"""

import math

import torch
from torch import Tensor

from stn_fx.augment.draws import Draws
from stn_fx.augment.images import check_images
from stn_fx.errors import InputError

LOG_ASPECT = math.log(10 / 3)


def draw_boxes(
    x_BCHW: Tensor, probability_B: Tensor, area_B: Tensor, draws: Draws, name: str, least: float = 0.0
) -> Tensor:
    """Rectangles (B, 4): top, left, height and width in pixels, int32; of size 0 where nothing is erased.

    Args:
        x_BCHW: images; only shape, dtype and device matter.
        probability_B: that an image loses a rectangle.
        area_B: the largest share of the image that it may take, 0 to 1.
        draws: source of the random numbers.
        name: what they are for, unique within one pass.
        least: the smallest share, except where `area_B` is less.
    """
    check_images(x_BCHW, "random_erasing")
    full_height, full_width = x_BCHW.shape[2:]
    chance, share, aspect, down, right = draws.uniform((x_BCHW.shape[0], 5), x_BCHW, name).unbind(-1)
    largest = area_B.detach().to(share.dtype)
    smallest = largest.clamp(max=least)
    pixels = (smallest + share * (largest - smallest)) * (full_height * full_width)
    root_aspect = ((aspect - 0.5) * LOG_ASPECT).exp()
    erased = (chance < probability_B.detach().to(chance.dtype)).to(chance.dtype)
    height = (pixels.sqrt() * root_aspect).round().clamp(max=full_height) * erased
    width = (pixels.sqrt() / root_aspect).round().clamp(max=full_width) * erased
    top = (down * (full_height - height + 1)).floor()
    left = (right * (full_width - width + 1)).floor()
    return torch.stack((top, left, height, width), dim=-1).to(torch.int32)


def erase(x_BCHW: Tensor, boxes_B4: Tensor) -> Tensor:
    """Images with 0 in the rectangles, shaped like `x_BCHW`.

    Raises:
        InputError: the input is no batch of images, or there is not one rectangle for each.
    """
    check_images(x_BCHW, "random_erasing")
    if boxes_B4.shape != (x_BCHW.shape[0], 4):
        raise InputError(
            f"random_erasing: rectangles of shape {tuple(boxes_B4.shape)} for {len(x_BCHW)} images. Pass (B, 4): top, "
            f"left, height, width."
        )
    top, left, height, width = boxes_B4[..., None].unbind(1)
    row = torch.arange(x_BCHW.shape[2], device=x_BCHW.device)
    column = torch.arange(x_BCHW.shape[3], device=x_BCHW.device)
    rows_BH = (row >= top) & (row < top + height)
    columns_BW = (column >= left) & (column < left + width)
    return x_BCHW.masked_fill((rows_BH[:, :, None] & columns_BW[:, None, :])[:, None], 0)
