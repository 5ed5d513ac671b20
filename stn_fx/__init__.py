"""stn_fx tunes the regularization hyperparameters of any unmodified PyTorch model, while it trains, in one run."""

from stn_fx.augment.image_format import ImageFormat
from stn_fx.bilevel import BilevelTrainer, DeltaSTN
from stn_fx.hparams import CustomHyperparameter, Hyperparameter
from stn_fx.rules.structure import LowRank, RowWise
from stn_fx.transform import SelfTuningModule, transform
from stn_fx.verify import check

__all__ = [
    "BilevelTrainer",
    "CustomHyperparameter",
    "DeltaSTN",
    "Hyperparameter",
    "ImageFormat",
    "LowRank",
    "RowWise",
    "SelfTuningModule",
    "check",
    "transform",
]
