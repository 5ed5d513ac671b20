"""Papers and recipes that several entries of the catalogue take their bounds and initial values from."""

STN = "STN (MacKay et al. 2019, arXiv 1903.03088)"
DELTA_STN = "Delta-STN (Bae & Grosse 2020, arXiv 2010.13514, appendix)"
TIMM = "timm's train.py"
TORCHVISION = "torchvision's references"
AWD_LSTM = "AWD-LSTM (Merity et al. 2017, arXiv 1708.02182)"
