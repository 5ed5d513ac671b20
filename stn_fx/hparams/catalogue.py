"""The catalogue: every hyperparameter that stn_fx can tune, with bounds, initial value, scale and source.

A raw value of -50 switches each of them off: rates, the number of holes and weights of the loss go to zero.
"""

import math

from stn_fx.hparams.entry import Catalogue, Component, Entry, ImageSide, OwnRate

DELTA_STN = "Delta-STN (Bae & Grosse 2020, arXiv 2010.13514, appendix)"

DROPOUT = Entry(
    name="dropout",
    kind="site",
    components=(Component("rate", low=0.0, high=0.95, initial=OwnRate(0.05), limits=(0.0, 1.0)),),
    description="probability that an element or a channel is dropped, at each dropout of the model",
    source=f"Srivastava et al. 2014 (JMLR 15); bounds and initial value: {DELTA_STN}",
    pattern_over="modules",
)

DROP_PATH = Entry(
    name="drop_path",
    kind="site",
    components=(Component("rate", low=0.0, high=0.95, initial=OwnRate(0.05), limits=(0.0, 1.0)),),
    description="probability that a residual branch is dropped for an example (stochastic depth)",
    source="Huang et al. 2016 (arXiv 1603.09382); bounds as for dropout",
    pattern_over="modules",
)

INPUT_DROPOUT = Entry(
    name="input_dropout",
    kind="input",
    components=(Component("rate", low=0.0, high=0.95, initial=0.05, limits=(0.0, 1.0)),),
    description="probability that an element of the input is dropped",
    source=f"Srivastava et al. 2014 (JMLR 15); bounds and initial value: {DELTA_STN}",
)

CUTOUT = Entry(
    name="cutout",
    kind="input",
    components=(
        Component("holes", low=0.0, high=4.0, initial=1.0, limits=(0.0, math.inf), discrete=True),
        Component(
            "length",
            low=0.0,
            high=ImageSide(0.75, whole=True),
            initial=ImageSide(0.125),
            limits=(0.0, math.inf),
            discrete=True,
        ),
    ),
    description="square holes of a number and a side length (pixels) that blank the input image",
    source=f"DeVries & Taylor 2017 (arXiv 1708.04552); 0 to 4 holes of 0 to 24 pixels at 32x32: {DELTA_STN}",
)

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

CATALOGUE = Catalogue((DROPOUT, DROP_PATH, INPUT_DROPOUT, CUTOUT, WEIGHT_DECAY, LABEL_SMOOTHING))
