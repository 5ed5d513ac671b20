"""Hyperparameters: what the user says, the catalogue, and the space of raw values that the outer optimizer moves.

The way of the data: `hparams` argument -> `parse_hparams` -> `Selection` -> (planned on a model) `resolve` ->
`ResolvedHyperparameter` -> `HyperparameterSpace`.
"""

from stn_fx.hparams.catalogue import CATALOGUE
from stn_fx.hparams.custom import CustomHyperparameter
from stn_fx.hparams.entry import Catalogue, Component, Entry, SiteContext
from stn_fx.hparams.hyperparameter import Hyperparameter
from stn_fx.hparams.resolve import ResolvedHyperparameter, resolve
from stn_fx.hparams.selection import Selection, default_selections, parse_hparams
from stn_fx.hparams.space import HyperparameterSpace

__all__ = [
    "CATALOGUE",
    "Catalogue",
    "Component",
    "CustomHyperparameter",
    "Entry",
    "Hyperparameter",
    "HyperparameterSpace",
    "ResolvedHyperparameter",
    "Selection",
    "SiteContext",
    "default_selections",
    "parse_hparams",
    "resolve",
]
