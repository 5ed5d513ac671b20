"""Regularizers that act on tensors, with parameters of their own for every example.

Each draws its random numbers first, through a `Draws`, and is then a deterministic function of tensors.
"""

from stn_fx.augment.align import align
from stn_fx.augment.blur import draw_sigma, gaussian_blur
from stn_fx.augment.colour import colour, draw_colour
from stn_fx.augment.cutout import cutout, draw_centres
from stn_fx.augment.draws import Draws, ReplayDraws
from stn_fx.augment.dropout import alpha_dropout_terms, channel_shape, dropout_multiplier, example_shape
from stn_fx.augment.erasing import draw_boxes, erase
from stn_fx.augment.geometry import affine_maps, draw_affine, horizontal_flip, warp
from stn_fx.augment.image_format import ImageFormat
from stn_fx.augment.input_dropout import input_dropout
from stn_fx.augment.noise import gaussian_noise, input_scale, scaled_noise

__all__ = [
    "Draws",
    "ImageFormat",
    "ReplayDraws",
    "affine_maps",
    "align",
    "alpha_dropout_terms",
    "channel_shape",
    "colour",
    "cutout",
    "draw_affine",
    "draw_boxes",
    "draw_centres",
    "draw_colour",
    "draw_sigma",
    "dropout_multiplier",
    "erase",
    "example_shape",
    "gaussian_blur",
    "gaussian_noise",
    "horizontal_flip",
    "input_dropout",
    "input_scale",
    "scaled_noise",
    "warp",
]
