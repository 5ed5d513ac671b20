"""Entries of the catalogue that act in the training loss."""

import math

from stn_fx.hparams.entry import Component, Entry

WEIGHT_DECAY = Entry(
    name="weight_decay",
    kind="loss",
    components=(Component("coefficient", low=0.0, high=1.0, initial=5e-4, limits=(0.0, math.inf)),),
    description="coefficient of 0.5 * |w|^2 in the training loss (the optimizer's own weight decay must be 0)",
    source="initial value: DeVries & Taylor 2017 and Zagoruyko & Komodakis 2016 (arXiv 1605.07146) for SGD",
)

LABEL_SMOOTHING = Entry(
    name="label_smoothing",
    kind="loss",
    components=(Component("mass", low=0.0, high=0.95, initial=0.05, limits=(0.0, 1.0)),),
    description="probability mass that the target gives to all classes evenly",
    source="Szegedy et al. 2016 (arXiv 1512.00567); recipes use 0.1 (torchvision, timm)",
)

LOSS_ENTRIES = (WEIGHT_DECAY, LABEL_SMOOTHING)
