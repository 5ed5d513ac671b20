"""Entries of the catalogue that act in the training loss."""

import math

from stn_fx.hparams.entry import Component, Entry
from stn_fx.hparams.sources import AWD_LSTM

WEIGHT_DECAY = Entry(
    name="weight_decay",
    kind="loss",
    components=(Component("coefficient", low=0.0, high=1.0, initial=5e-4, limits=(0.0, math.inf)),),
    pattern_over="weights",
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

L1 = Entry(
    name="l1",
    kind="loss",
    pattern_over="weights",
    components=(Component("coefficient", low=0.0, high=0.05, initial=1e-5, limits=(0.0, math.inf)),),
    description="coefficient of the sum of |w| in the training loss",
    source="Tibshirani 1996 (lasso); 1e-5 is usual for networks of 1e5 weights and more",
)

CONFIDENCE_PENALTY = Entry(
    name="confidence_penalty",
    kind="loss",
    components=(Component("coefficient", low=0.0, high=4.0, initial=0.1, limits=(0.0, math.inf)),),
    description="reward for the entropy of the predicted classes, in nats",
    source="Pereyra et al. 2017 (arXiv 1701.06548), section 4: 0.1 for CIFAR-10 and digits",
)

ACTIVATION_REGULARIZATION = Entry(
    name="activation_regularization",
    kind="activation",
    pattern_over="modules",
    components=(Component("coefficient", low=0.0, high=10.0, initial=0.2, limits=(0.0, math.inf)),),
    description="coefficient of the mean square of a module's output, after a dropout that is inserted there",
    source=f"{AWD_LSTM}: 2 on the dropped output of the last LSTM layer; started at a tenth, activations differ",
)

TEMPORAL_ACTIVATION_REGULARIZATION = Entry(
    name="temporal_activation_regularization",
    kind="activation",
    pattern_over="modules",
    components=(Component("coefficient", low=0.0, high=10.0, initial=0.1, limits=(0.0, math.inf)),),
    description="coefficient of the mean square change of a module's output from one time step to the next",
    source=f"{AWD_LSTM}: 1 on the output of the last LSTM layer before its dropout; started at a tenth",
)

LOSS_ENTRIES = (
    WEIGHT_DECAY, L1, LABEL_SMOOTHING, CONFIDENCE_PENALTY,
    ACTIVATION_REGULARIZATION, TEMPORAL_ACTIVATION_REGULARIZATION,
)  # fmt: skip
