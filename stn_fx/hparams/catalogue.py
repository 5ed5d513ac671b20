"""The catalogue: every hyperparameter that stn_fx can tune, with bounds, initial value, scale and source.

A raw value of -50 switches each of them off: rates, the number of holes and weights of the loss go to zero.
"""

from stn_fx.hparams.entry import Catalogue
from stn_fx.hparams.input_entries import INPUT_ENTRIES
from stn_fx.hparams.loss_entries import LOSS_ENTRIES
from stn_fx.hparams.mixing_entries import MIXING_ENTRIES
from stn_fx.hparams.model_entries import MODEL_ENTRIES

CATALOGUE = Catalogue((*MODEL_ENTRIES, *INPUT_ENTRIES, *MIXING_ENTRIES, *LOSS_ENTRIES))
