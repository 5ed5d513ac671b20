"""Entries of the catalogue that mix the examples of a batch and their targets."""

from stn_fx.hparams.entry import Component, Entry
from stn_fx.hparams.sources import TIMM, TORCHVISION

MIXUP = Entry(
    name="mixup",
    kind="mixing",
    components=(Component("alpha", low=0.0, high=2.0, initial=0.2, limits=(0.0, 100.0)),),
    description="each example is mixed with another; its share is drawn from Beta(alpha, alpha)",
    source=f"Zhang et al. 2018 (arXiv 1710.09412): 0.1 to 0.4 on ImageNet; 0.2: {TORCHVISION}, 0.8: {TIMM} for ViT",
)

CUTMIX = Entry(
    name="cutmix",
    kind="mixing",
    components=(Component("alpha", low=0.0, high=2.0, initial=0.2, limits=(0.0, 100.0)),),
    description="a rectangle of another image is put into each; the share that stays is drawn from Beta(alpha, alpha)",
    source=f"Yun et al. 2019 (arXiv 1905.04899) and {TORCHVISION}: 1.0; started lower, as mixup",
)

MIXING_ENTRIES = (MIXUP, CUTMIX)
