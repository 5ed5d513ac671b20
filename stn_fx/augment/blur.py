"""Gaussian blur with an own standard deviation for every image, as two matrix products.

A one-dimensional blur is a banded matrix, one per image, so blurring is `rows @ image @ columns` whatever the size of
the kernel, without a convolution per example. Along the band the matrix repeats itself: images are cut into strips with
what they depend on around them, and one small matrix blurs all strips of an image. At 224 pixels and a radius of 6 that
is an eighth of the whole product. It equals
`torchvision.transforms.v2.functional.gaussian_blur` with kernel size 2 * radius + 1, whose weights are a softmax of
`-(offset / sigma)^2 / 2`.

Shape suffixes: B examples, C channels, H and W pixels, K = 2 * radius + 1 taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stn_fx.augment.draws import Draws
from stn_fx.augment.images import check_images, check_per_example, piece_by_piece, where_active, working
from stn_fx.errors import InputError

# Below this many pixels the neighbours' weight exp(-0.5 / sigma^2) is 0 in float64.
SHARP = 0.02

# Pixels of a strip, on CPU. On GPUs and for small images one strip is the whole axis: fewer operations.
STRIP = 16


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

    sigma_B = sigma_B.detach()
    offset_K = torch.arange(-radius, radius + 1, dtype=working(x_BCHW).dtype, device=x_BCHW.device)
    relative_BK = offset_K / sigma_B.to(offset_K.dtype).clamp(min=SHARP)[:, None]
    weight_BK = torch.softmax(relative_BK.square().mul_(-0.5), dim=-1)
    height, width = x_BCHW.shape[2:]
    rows, columns = (_strip(size, radius, x_BCHW.device) for size in (height, width))
    down, across = (_matrix(weight_BK, *axis) for axis in ((height, rows), (width, columns)))
    begin_S = torch.arange(0, height, rows, device=x_BCHW.device)
    reach_R = torch.arange(-radius, rows + radius, device=x_BCHW.device)
    sources = _reflected(begin_S[:, None] + reach_R, height).flatten()

    def blurred(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
        images = _down_in_strips(images, sources, down) if rows < height else down[:, None] @ images
        return _across_in_strips(images, across) if columns < width else images @ across.mT[:, None]

    def change(images: Tensor, active_B: Tensor, down: Tensor, across: Tensor, out: Tensor | None = None) -> Tensor:
        return where_active(active_B, lambda working: blurred(working, down, across), images, out)

    return piece_by_piece(change, x_BCHW, sigma_B > SHARP, down, across)


def _strip(size: int, radius: int, device: torch.device) -> int:
    """Pixels of a strip along an axis of this size; strips are equally long, the last may reach beyond the image."""
    strips = -(-size // max(STRIP, 2 * radius)) if device.type == "cpu" and size > 4 * STRIP else 1
    return -(-size // strips)


def _matrix(weight_BK: Tensor, size: int, strip: int) -> Tensor:
    """Matrices that blur along one axis: (B, size, size), or for a strip (B, strip, strip + 2 * radius)."""
    count, taps = weight_BK.shape
    if strip == size:
        place_S, tap_K = (torch.arange(number, device=weight_BK.device) for number in (size, taps))
        index_BSK = _reflected(place_S[:, None] + tap_K - taps // 2, size).expand(count, -1, -1)
        values_BSK = weight_BK[:, None].expand(-1, size, -1)
        return weight_BK.new_zeros(count, size, size).scatter_add_(2, index_BSK, values_BSK)
    # The weights and as many zeros as there are rows, again and again: cut one shorter, each row begins one further.
    rows = F.pad(weight_BK[:, None].expand(-1, strip, -1), (0, strip)).flatten(1)
    return rows[:, : strip * (strip + taps - 1)].reshape(count, strip, -1)


def _reflected(place: Tensor, size: int) -> Tensor:
    """Pixels behind places up to `size - 1` outside the image, reflected without repeating the edge."""
    place = place.abs()
    return torch.minimum(place, (2 * (size - 1) - place).abs())


def _down_in_strips(images: Tensor, sources: Tensor, band_BSR: Tensor) -> Tensor:
    """Blur along the height; S pixels of a strip, which depend on R, for all strips in `sources`."""
    (count, channels, height, width), reach = images.shape, band_BSR.shape[2]
    strips = images.index_select(2, sources).reshape(count, -1, reach, width)
    return (band_BSR[:, None] @ strips).reshape(count, channels, -1, width)[:, :, :height]


def _across_in_strips(images: Tensor, band_BSR: Tensor) -> Tensor:
    """Blur along the width; S pixels of a strip, which depend on R."""
    (count, channels, height, width), (strip, reach) = images.shape, band_BSR.shape[1:]
    radius = (reach - strip) // 2
    wide = F.pad(images, (radius, radius, 0, 0), mode="reflect")
    if width % strip:
        wide = F.pad(wide, (0, strip - width % strip))
    strips = wide.unfold(3, reach, strip).reshape(count, -1, reach)
    return (strips @ band_BSR.mT).reshape(count, channels, height, -1)[..., :width]
