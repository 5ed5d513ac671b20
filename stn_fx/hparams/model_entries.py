"""Entries of the catalogue that act inside the model."""

import math

from stn_fx.hparams.entry import Component, Entry, Option, OwnRate
from stn_fx.hparams.sources import AWD_LSTM, DELTA_STN

DROPOUT = Entry(
    name="dropout",
    kind="site",
    components=(Component("rate", low=0.0, high=0.95, initial=OwnRate(0.05), limits=(0.0, 1.0)),),
    description="probability that an element or a channel is dropped, at each dropout of the model",
    source=f"Srivastava et al. 2014 (JMLR 15); bounds and initial value: {DELTA_STN}",
    pattern_over="modules",
    options=(
        Option("locked", "one mask for all time steps of a sequence: variational dropout (Gal & Ghahramani 2016)"),
        Option("channels", "whole channels (axis 1) are dropped, as by nn.Dropout2d"),
    ),
)

NOISE = Entry(
    name="noise",
    kind="site",
    components=(Component("std", low=0.0, high=1.0, initial=0.05, limits=(0.0, math.inf)),),
    description="Gaussian noise added to activations, inserted where dropout would be or at the modules that @ names",
    source="Poole et al. 2014 (arXiv 1406.1831): 0.1 and more on normalised activations",
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

WEIGHT_DROP = Entry(
    name="weight_drop",
    kind="site",
    components=(Component("rate", low=0.0, high=0.95, initial=0.2, limits=(0.0, 1.0)),),
    description="probability that a hidden-to-hidden weight of nn.LSTM, nn.GRU or nn.RNN is dropped, for all steps",
    source=f"{AWD_LSTM}: DropConnect of 0.5 (PTB) and 0.2 (WikiText-2); started at the lower",
    pattern_over="modules",
)

MODEL_ENTRIES = (DROPOUT, DROP_PATH, NOISE, WEIGHT_DROP)
