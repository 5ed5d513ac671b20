"""Rotation, translation, scaling, shear and horizontal flip with own parameters for every image, as one affine map.

All of them are composed into one matrix per image, so the batch is sampled once (bilinear; what comes from outside the
image is 0, the mean colour of normalised images, as the holes of cutout). Matrices are those of
`torchvision.transforms.v2.functional.affine`. Images whose map is the identity stay as they are, bit by bit.

Shape suffixes: B examples, C channels, H and W pixels.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from stn_fx.augment.draws import Draws
from stn_fx.augment.images import check_images, symmetric, where_active, working

# A map that moves no pixel by more than this (relative to half a side) is the identity: float32 cannot tell.
STILL = 1e-6


def draw_affine(x_BCHW: Tensor, strengths: Mapping[str, Tensor], draws: Draws, name: str) -> Tensor:
    """Random affine maps (B, 2, 3) of the given strengths, for `warp`.

    Args:
        x_BCHW: images; only shape, dtype and device matter.
        strengths: any of, each (B,): `rotation` (largest angle, degrees), `translation` (largest shift, as a fraction
            of the side), `scaling` (largest logarithm of the factor), `shear` (largest angle on each axis, degrees),
            `horizontal_flip` (probability).
        draws: source of the random numbers.
        name: what they are for, unique within one pass.
    """
    check_images(x_BCHW, "A geometric augmentation")

    def within(key: str, part: str = "") -> Tensor | None:
        return symmetric(strengths[key], x_BCHW, draws, f"{name}.{key}{part}") if key in strengths else None

    flip_B = None
    if "horizontal_flip" in strengths:
        unit_B = draws.uniform((x_BCHW.shape[0],), x_BCHW, f"{name}.horizontal_flip")
        flip_B = unit_B < strengths["horizontal_flip"].detach().to(unit_B.dtype)
    height, width = x_BCHW.shape[2:]
    right, down, scaling_B = within("translation", ".x"), within("translation", ".y"), within("scaling")
    return affine_maps(
        x_BCHW,
        angle_B=within("rotation"),
        right_B=None if right is None else right * width,
        down_B=None if down is None else down * height,
        scale_B=None if scaling_B is None else scaling_B.exp(),
        shear_x_B=within("shear", ".x"),
        shear_y_B=within("shear", ".y"),
        flip_B=flip_B,
    )


def affine_maps(
    x_BCHW: Tensor,
    angle_B: Tensor | None = None,
    right_B: Tensor | None = None,
    down_B: Tensor | None = None,
    scale_B: Tensor | None = None,
    shear_x_B: Tensor | None = None,
    shear_y_B: Tensor | None = None,
    flip_B: Tensor | None = None,
) -> Tensor:
    """Maps (B, 2, 3) from output to input pixels, both measured from the centre, as torchvision's `affine`.

    Args:
        x_BCHW: images; only shape, dtype and device matter.
        angle_B: clockwise rotation, degrees.
        right_B: translation in pixels; as `down_B`.
        down_B: see there.
        scale_B: factor, positive.
        shear_x_B: angle of the shear along x, degrees; as `shear_y_B`.
        shear_y_B: see there.
        flip_B: whether the image is mirrored (left and right) before everything else.
    """
    dtype = torch.float64 if x_BCHW.dtype == torch.float64 else torch.float32
    zero_B = torch.zeros(x_BCHW.shape[0], dtype=dtype, device=x_BCHW.device)

    def given(value_B: Tensor | None, otherwise: Tensor) -> Tensor:
        return otherwise if value_B is None else value_B.to(dtype)

    rotation_B = torch.deg2rad(given(angle_B, zero_B))
    shear_x, shear_y = torch.deg2rad(given(shear_x_B, zero_B)), torch.deg2rad(given(shear_y_B, zero_B))
    right, down, scale = given(right_B, zero_B), given(down_B, zero_B), given(scale_B, zero_B + 1)
    # torchvision's _get_inverse_affine_matrix: the inverse of rotation * shear (of determinant 1) * scale.
    tilted = rotation_B - shear_y
    a = tilted.cos() / shear_y.cos()
    b = -a * shear_x.tan() - rotation_B.sin()
    c = tilted.sin() / shear_y.cos()
    d = -c * shear_x.tan() + rotation_B.cos()
    x_row = torch.stack((d, -b, b * down - d * right), -1) / scale[:, None]
    y_row = torch.stack((-c, a, c * right - a * down), -1) / scale[:, None]
    if flip_B is not None:
        x_row = torch.where(flip_B[:, None], -x_row, x_row)
    return torch.stack((x_row, y_row), 1)


def warp(x_BCHW: Tensor, maps_B23: Tensor) -> Tensor:
    """Images sampled through the maps of `draw_affine` or `affine_maps`, shaped like `x_BCHW`, in its dtype."""
    check_images(x_BCHW, "A geometric augmentation")
    if x_BCHW.numel() == 0:
        return x_BCHW
    height, width = x_BCHW.shape[2:]
    # grid_sample measures in halves of the sides, from -1 to 1.
    x_row, y_row = maps_B23.unbind(1)
    x_row = torch.stack((x_row[:, 0], x_row[:, 1] * (height / width), x_row[:, 2] * (2 / width)), -1)
    y_row = torch.stack((y_row[:, 0] * (width / height), y_row[:, 1], y_row[:, 2] * (2 / height)), -1)
    theta_B23 = torch.stack((x_row, y_row), 1)
    still_23 = torch.eye(2, 3, dtype=theta_B23.dtype, device=theta_B23.device)
    moves_B = ((theta_B23 - still_23).abs() > STILL).flatten(1).any(1)
    theta_B23 = theta_B23.to(working(x_BCHW).dtype)
    # What affine_grid gives, as a sum of lines and columns instead of a matrix product over all pixels, and as planes
    # of x and y: grid_sample takes any strides.
    place_W = torch.linspace(1 / width - 1, 1 - 1 / width, width, dtype=theta_B23.dtype, device=theta_B23.device)
    place_H = torch.linspace(1 / height - 1, 1 - 1 / height, height, dtype=theta_B23.dtype, device=theta_B23.device)
    across_B21W = (theta_B23[..., :1] * place_W)[:, :, None]
    down_B2H1 = (theta_B23[..., 1:2] * place_H + theta_B23[..., 2:])[..., None]

    def sample(images: Tensor) -> Tensor:
        grid_BHW2 = (across_B21W + down_B2H1).permute(0, 2, 3, 1)
        return F.grid_sample(images, grid_BHW2, mode="bilinear", padding_mode="zeros", align_corners=False)

    # Not in pieces: what lies between the passes is the grid alone, and the images would be copied once more.
    return where_active(moves_B, sample, x_BCHW)


def horizontal_flip(x_BCHW: Tensor, probability_B: Tensor, draws: Draws, name: str) -> Tensor:
    """Each image mirrored with its own probability; exact, for when nothing else moves the pixels."""
    check_images(x_BCHW, "horizontal_flip")
    unit_B = draws.uniform((x_BCHW.shape[0],), x_BCHW, name)
    flip_B = unit_B < probability_B.detach().to(unit_B.dtype)
    return torch.where(flip_B.reshape(-1, 1, 1, 1), x_BCHW.flip(-1), x_BCHW)
