"""Brightness, contrast, saturation and hue with own factors for every image, on what the pixels mean.

The formulas are those of `torchvision.transforms.v2.functional`, in the order brightness, contrast, saturation, hue,
each clamped to [0, 1]. Normalisation is undone in the first pass over memory and redone in the last (`ImageFormat`).
Images whose factors are all neutral stay as they are, bit by bit, also where they lie outside [0, 1].

Shape suffixes: B examples, C channels, H and W pixels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from stn_fx.augment.draws import Draws
from stn_fx.augment.image_format import ImageFormat, per_channel
from stn_fx.augment.images import (
    check_images,
    check_per_example,
    example_by_example,
    piece_by_piece,
    symmetric,
    where_active,
)
from stn_fx.errors import InputError

# ITU-R BT.601, as torchvision and PIL round them.
LUMINANCE = (0.2989, 0.587, 0.114)

# A hue that moves by less than this part of a turn does not move a pixel's value in float32.
STILL = 1e-7


def draw_colour(x_BCHW: Tensor, strengths: Mapping[str, Tensor], draws: Draws, name: str) -> dict[str, Tensor]:
    """Random arguments of `colour` by name, each (B,).

    Args:
        x_BCHW: images; only shape, dtype and device matter.
        strengths: any of, each (B,): `brightness`, `contrast`, `saturation` (factors are uniform in 1 - strength to
            1 + strength, from 0 on), `hue` (shifts are uniform within the strength, as a part of the full turn).
        draws: source of the random numbers.
        name: what they are for, unique within one pass.
    """
    drawn = {key: symmetric(strength, x_BCHW, draws, f"{name}.{key}") for key, strength in strengths.items()}
    return {key: value if key == "hue" else (1 + value).clamp_(min=0) for key, value in drawn.items()}


def colour(
    x_BCHW: Tensor,
    image_format: ImageFormat,
    brightness: Tensor | None = None,
    contrast: Tensor | None = None,
    saturation: Tensor | None = None,
    hue: Tensor | None = None,
) -> Tensor:
    """Images with changed colours, shaped like `x_BCHW`, in its dtype.

    Args:
        x_BCHW: images with 1 or 3 channels.
        image_format: what their numbers mean.
        brightness: factors (B,), 1 = unchanged, not negative; None = unchanged for all.
        contrast: the same, towards the mean grey of the image.
        saturation: the same, towards each pixel's grey; needs 3 channels.
        hue: shifts (B,) in [-0.5, 0.5] as parts of the full turn; needs 3 channels.

    Raises:
        InputError: the input is no batch of images, or has not the channels that are needed.
    """
    check_images(x_BCHW, "A colour augmentation")
    factors = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
    check_per_example(x_BCHW, "colour", **factors)
    channels = x_BCHW.shape[1]
    image_format.check_channels(channels)
    given = [name for name, value_B in factors.items() if value_B is not None]
    check_channels(channels, given)
    if x_BCHW.numel() == 0 or not given:
        return x_BCHW

    def change(images: Tensor, *values_B: Tensor | None, out: Tensor | None = None) -> Tensor:
        return _colour(images, image_format, dict(zip(factors, values_B, strict=True)), out)

    return piece_by_piece(change, x_BCHW, *factors.values())


def check_channels(channels: int, names: list[str]) -> None:
    """InputError where an operation needs colour and the images are grey, or have channels of another meaning."""
    needing = [name for name in names if name in ("saturation", "hue")]
    if channels not in (1, 3) or (channels == 1 and needing):
        raise InputError(
            f"{', '.join(needing or names)} {'need' if len(needing or names) > 1 else 'needs'} "
            f"{'images with 3 channels (red, green, blue)' if needing else 'grey or colour images (1 or 3 channels)'}, "
            f"and these have {channels}. Leave {', '.join(needing or names)} out."
        )


def _colour(x: Tensor, image_format: ImageFormat, factors: Mapping[str, Tensor | None], out: Tensor | None) -> Tensor:
    active_B = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for name, value_B in factors.items():
        if value_B is not None:
            active_B = active_B | ((value_B.abs() > STILL) if name == "hue" else (value_B != 1))

    def change(images: Tensor) -> Tensor:
        given = {n: None if v is None else example_by_example(images, v) for n, v in factors.items()}
        mean, std = per_channel(image_format.means, images), per_channel(image_format.stds, images)
        # Without brightness its factor is 1: undoing the normalisation takes the same pass.
        factor = 1.0 if given["brightness"] is None else given["brightness"]
        pixels = images.mul(std * factor).add_(mean * factor).clamp_(0, 1)
        if given["contrast"] is not None:
            pixels = _blend(pixels, _mean_grey(pixels), given["contrast"])
        if given["saturation"] is not None:
            pixels = _blend(pixels, _grey(pixels), given["saturation"])
        if given["hue"] is not None:
            pixels = _shift_hue(pixels, given["hue"][:, 0])
        return pixels.div_(std).sub_(mean / std)

    return where_active(active_B, change, x, out)


def _blend(pixels: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """`factor * pixels + (1 - factor) * other`, clamped, in the memory of `pixels`."""
    return pixels.mul_(factor).add_(other * (1 - factor)).clamp_(0, 1)


def _grey(pixels: Tensor) -> Tensor:
    """Luminance (B, 1, H, W) of colour images."""
    red, green, blue = pixels.split(1, dim=1)
    return (red * LUMINANCE[0]).add_(green, alpha=LUMINANCE[1]).add_(blue, alpha=LUMINANCE[2])


def _mean_grey(pixels: Tensor) -> Tensor:
    """Mean luminance (B, 1, 1, 1) of the images: the luminance of their mean colour."""
    means = pixels.mean((2, 3), keepdim=True)
    return means if pixels.shape[1] == 1 else _grey(means)


def _shift_hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Hue shifted by parts of the full turn (B, 1, 1), saturation and value (of HSV) kept.

    With the hue in sixths of a turn, h, a channel is `value - chroma * clamp(2 - |k - 2|, 0, 1)` where
    `k = (n + h) mod 6` and n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = pixels.unbind(1)
    # Pairwise: a reduction over an axis of three is many times slower.
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # Where there is no chroma the differences are 0, and the hue does not matter.
    scale = 1 / chroma.clamp(min=torch.finfo(pixels.dtype).tiny)
    of_red = torch.sub(green, blue).mul_(scale)
    of_green = torch.sub(blue, red).mul_(scale).add_(2)
    of_blue = torch.sub(red, green).mul_(scale).add_(4)
    # The largest channel decides; 1 where it is another. Comparisons and torch.where take four times as long on CPU.
    not_red, not_green = (value - red).ceil_(), (value - green).ceil_()
    hue = torch.lerp(of_red, torch.lerp(of_green, of_blue, not_green), not_red).add_(6 * shift)
    shifted = torch.empty_like(pixels)
    for channel, offset in enumerate((5, 3, 1)):
        position = hue + offset
        position.sub_((position / 6).floor_(), alpha=6)
        weight = position.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
        shifted[:, channel] = value - weight.mul_(chroma)
    return shifted
