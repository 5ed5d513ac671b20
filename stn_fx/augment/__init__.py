"""Regularizers that act on tensors, with parameters of their own for every example.

Each draws its random numbers first, through a `Draws`, and is then a deterministic function of tensors.
"""

from stn_fx.augment.align import align
from stn_fx.augment.cutout import cutout, draw_centres
from stn_fx.augment.draws import Draws, ReplayDraws
from stn_fx.augment.dropout import alpha_dropout_terms, channel_shape, dropout_multiplier, example_shape
from stn_fx.augment.input_dropout import input_dropout

__all__ = [
    "Draws",
    "ReplayDraws",
    "align",
    "alpha_dropout_terms",
    "channel_shape",
    "cutout",
    "draw_centres",
    "dropout_multiplier",
    "example_shape",
    "input_dropout",
]
