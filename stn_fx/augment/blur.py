"""Gaussian blur with an own standard deviation for every image, as two matrix products.

A one-dimensional blur with reflected borders is a banded matrix, one per image, so blurring is `rows @ image @ columns`
whatever the size of the kernel, without a convolution per example. It equals
`torchvision.transforms.v2.functional.gaussian_blur` with kernel size 2 * radius + 1, whose weights are a softmax of
`-(offset / sigma)^2 / 2`.

Shape suffixes: B examples, C channels, H and W pixels, K = 2 * radius + 1 taps.
"""

import torch
from torch import Tensor

from stn_fx.augment.draws import Draws
from stn_fx.augment.images import check_images, check_per_example, where_active
from stn_fx.errors import InputError

# Below this many pixels the neighbours' weight exp(-0.5 / sigma^2) is 0 in float64.
SHARP = 0.02


def draw_sigma(x_BCHW: Tensor, strength_B: Tensor, draws: Draws, name: str) -> Tensor:
    """Standard deviations (B,) in pixels, uniform in [0, strength), in the precision to compute in."""
    unit_B = draws.uniform((x_BCHW.shape[0],), x_BCHW, name)
    return unit_B * strength_B.detach().to(unit_B.dtype)


def gaussian_blur(x_BCHW: Tensor, sigma_B: Tensor, radius: int) -> Tensor:
    """Blurred images, shaped like `x_BCHW`, in its dtype; bit by bit the same where sigma is below `SHARP`.

    Args:
        x_BCHW: images with any number of channels.
        sigma_B: standard deviation in pixels.
        radius: where the kernel is cut off, in pixels; at most the shorter side less one is used.

    Raises:
        InputError: the input is no batch of images, or the radius is negative.
    """
    check_images(x_BCHW, "gaussian_blur")
    check_per_example(x_BCHW, "gaussian_blur", sigma=sigma_B)
    if radius < 0:
        raise InputError(f"gaussian_blur: radius={radius} is negative. Give the kernel's reach in pixels, 0 or more.")
    radius = min(radius, min(x_BCHW.shape[2:]) - 1)
    if x_BCHW.numel() == 0 or radius == 0:
        return x_BCHW

    def blur(images: Tensor) -> Tensor:
        offset_K = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
        relative_BK = offset_K / sigma_B.detach().to(images.dtype).clamp(min=SHARP)[:, None]
        weight_BK = torch.softmax(relative_BK.square().mul_(-0.5), dim=-1)
        rows_BHH, columns_BWW = (_matrix(weight_BK, size) for size in images.shape[2:])
        return rows_BHH[:, None] @ (images @ columns_BWW.transpose(1, 2)[:, None])

    return where_active(sigma_B > SHARP, blur, x_BCHW)


def _matrix(weight_BK: Tensor, size: int) -> Tensor:
    """Matrices (B, size, size) that blur along one axis, borders reflected without repeating the edge."""
    taps = weight_BK.shape[1]
    device = weight_BK.device
    place_S = torch.arange(size, device=device)
    source_SK = place_S[:, None] + torch.arange(taps, device=device) - taps // 2
    source_SK = source_SK.abs()
    source_SK = torch.minimum(source_SK, 2 * (size - 1) - source_SK)
    matrices = weight_BK.new_zeros(len(weight_BK), size, size)
    index_BSK = source_SK.expand(len(weight_BK), size, taps)
    return matrices.scatter_add_(2, index_BSK, weight_BK[:, None, :].expand(-1, size, -1))
