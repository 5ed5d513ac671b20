"""Entries of the catalogue that act on an input of the model."""

import math

from stn_fx.hparams.entry import Component, Entry, ImageSide, Option, OwnRate
from stn_fx.hparams.sources import DELTA_STN, STN, TIMM, TORCHVISION

INPUT_DROPOUT = Entry(
    name="input_dropout",
    kind="input",
    pattern_over="inputs",
    components=(Component("rate", low=0.0, high=0.95, initial=0.05, limits=(0.0, 1.0)),),
    description="probability that an element of the input is dropped",
    source=f"Srivastava et al. 2014 (JMLR 15); bounds and initial value: {DELTA_STN}",
)

CUTOUT = Entry(
    name="cutout",
    kind="input",
    pattern_over="inputs",
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
    needs="image",
    description="square holes of a number and a side length (pixels) that blank the input image",
    source=f"DeVries & Taylor 2017 (arXiv 1708.04552); 0 to 4 holes of 0 to 24 pixels at 32x32: {DELTA_STN}",
)

INPUT_SCALE = Entry(
    name="input_scale",
    kind="input",
    pattern_over="inputs",
    components=(Component("strength", low=0.0, high=1.0, initial=0.05, limits=(0.0, 1.0)),),
    description="factor on the whole input, uniform in 1 - strength to 1 + strength",
    source=STN,
)

GAUSSIAN_NOISE = Entry(
    name="gaussian_noise",
    kind="input",
    pattern_over="inputs",
    components=(Component("std", low=0.0, high=1.0, initial=OwnRate(0.05), limits=(0.0, math.inf)),),
    description="Gaussian noise added to the input, in the input's own units",
    source="Bishop 1995 (Neural Computation 7), noise of 0.1 and more for inputs of variance 1",
)

RANDOM_ERASING = Entry(
    name="random_erasing",
    kind="input",
    pattern_over="inputs",
    needs="image",
    components=(
        Component("probability", low=0.0, high=1.0, initial=OwnRate(0.1), limits=(0.0, 1.0)),
        Component("area", low=0.0, high=0.5, initial=OwnRate(0.2), limits=(0.0, 1.0)),
    ),
    description="a rectangle of up to this share of the image is set to 0, with this probability",
    source=f"Zhong et al. 2017 (arXiv 1708.04896), areas to 0.4; probability 0.1: {TORCHVISION}, 0.25: {TIMM} for ViT",
)

ROTATION = Entry(
    name="rotation",
    kind="input",
    pattern_over="inputs",
    needs="image",
    components=(Component("degrees", low=0.0, high=45.0, initial=OwnRate(5.0), limits=(0.0, 180.0)),),
    description="largest angle of a random rotation",
    source="AutoAugment (Cubuk et al. 2018, arXiv 1805.09501): up to 30 degrees",
)

TRANSLATION = Entry(
    name="translation",
    kind="input",
    pattern_over="inputs",
    needs="image",
    components=(Component("fraction", low=0.0, high=0.5, initial=OwnRate(0.05), limits=(0.0, 1.0)),),
    description="largest random shift along each axis, as a fraction of the side",
    source="AutoAugment (Cubuk et al. 2018, arXiv 1805.09501): up to 150 of 331 pixels; 4 of 32 in CIFAR recipes",
)

SCALING = Entry(
    name="scaling",
    kind="input",
    pattern_over="inputs",
    needs="image",
    components=(Component("log_factor", low=0.0, high=0.7, initial=OwnRate(0.1), limits=(0.0, 3.0)),),
    description="largest logarithm of a random zoom, in and out (0.7 is a factor of 2)",
    source="torchvision.transforms.RandomAffine; a factor of 2 as in its ScaleJitter",
)

SHEAR = Entry(
    name="shear",
    kind="input",
    pattern_over="inputs",
    needs="image",
    components=(Component("degrees", low=0.0, high=40.0, initial=OwnRate(5.0), limits=(0.0, 80.0)),),
    description="largest angle of a random shear along each axis",
    source="AutoAugment (Cubuk et al. 2018, arXiv 1805.09501): up to 0.3, 17 degrees",
)

HORIZONTAL_FLIP = Entry(
    name="horizontal_flip",
    kind="input",
    pattern_over="inputs",
    needs="image",
    components=(Component("probability", low=0.0, high=1.0, initial=OwnRate(0.25), limits=(0.0, 1.0)),),
    description="probability that the image is mirrored",
    source=f"0.5 in {TORCHVISION} and {TIMM}; half of it to start, since not every data set is symmetric",
)

GAUSSIAN_BLUR = Entry(
    name="gaussian_blur",
    kind="input",
    pattern_over="inputs",
    needs="image",
    components=(Component("sigma", low=0.0, high=2.0, initial=OwnRate(0.5), limits=(0.0, 50.0)),),
    description="Gaussian blur, its standard deviation (pixels) uniform from 0 to sigma",
    source="SimCLR (Chen et al. 2020, arXiv 2002.05709): sigma from 0.1 to 2",
)

BRIGHTNESS = Entry(
    name="brightness",
    kind="input",
    pattern_over="inputs",
    needs="pixels",
    components=(Component("strength", low=0.0, high=1.0, initial=OwnRate(0.1), limits=(0.0, 5.0)),),
    description="factor on the brightness, uniform in 1 - strength to 1 + strength",
    source=f"{STN}; ColorJitter of 0.4: {TIMM}",
)

CONTRAST = Entry(
    name="contrast",
    kind="input",
    pattern_over="inputs",
    needs="pixels",
    components=(Component("strength", low=0.0, high=1.0, initial=OwnRate(0.1), limits=(0.0, 5.0)),),
    description="factor on the contrast, towards the mean grey, uniform in 1 - strength to 1 + strength",
    source=f"{STN}; ColorJitter of 0.4: {TIMM}",
)

SATURATION = Entry(
    name="saturation",
    kind="input",
    pattern_over="inputs",
    needs="colour",
    components=(Component("strength", low=0.0, high=1.0, initial=OwnRate(0.1), limits=(0.0, 5.0)),),
    description="factor on the saturation, towards grey, uniform in 1 - strength to 1 + strength",
    source=f"{STN}; ColorJitter of 0.4: {TIMM}",
)

HUE = Entry(
    name="hue",
    kind="input",
    pattern_over="inputs",
    needs="colour",
    components=(Component("strength", low=0.0, high=0.5, initial=OwnRate(0.05), limits=(0.0, 0.5)),),
    description="shift of the hue within this part of the full turn",
    source=f"{STN}; 0.2 in SimCLR (Chen et al. 2020, arXiv 2002.05709)",
)

MASK_TOKEN = Option("mask_token", "the token that stands for a dropped one", default=None)
PADDING = Option("padding", "the token that is never dropped; -1 for none", default=0)

WORD_DROPOUT = Entry(
    name="word_dropout",
    kind="input",
    pattern_over="inputs",
    needs="tokens",
    components=(Component("rate", low=0.0, high=0.95, initial=0.05, limits=(0.0, 1.0)),),
    description="probability that a token is replaced by the mask token",
    source="Bowman et al. 2016 (arXiv 1511.06349); rates of 0.1 (AWD-LSTM's embedding dropout, arXiv 1708.02182)",
    options=(MASK_TOKEN, PADDING),
)

SPAN_MASKING = Entry(
    name="span_masking",
    kind="input",
    pattern_over="inputs",
    needs="tokens",
    components=(
        Component("rate", low=0.0, high=0.95, initial=0.05, limits=(0.0, 1.0)),
        Component("length", low=0.0, high=10.0, initial=3.0, limits=(0.0, 1000.0), discrete=True),
    ),
    description="share of the tokens that are replaced by the mask token, in spans of this length",
    source="SpanBERT (Joshi et al. 2020, arXiv 1907.10529): 0.15 of the tokens, spans of 3.8 on average, 10 at most",
    options=(MASK_TOKEN, PADDING),
)

INPUT_ENTRIES = (
    WORD_DROPOUT, SPAN_MASKING,
    HORIZONTAL_FLIP, ROTATION, TRANSLATION, SCALING, SHEAR, GAUSSIAN_BLUR, BRIGHTNESS, CONTRAST, SATURATION, HUE,
    INPUT_SCALE, GAUSSIAN_NOISE, RANDOM_ERASING, CUTOUT, INPUT_DROPOUT,
)  # fmt: skip
"""In the order in which they act on an input, whatever the order in which the user names them."""
