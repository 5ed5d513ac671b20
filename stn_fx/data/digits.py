"""scikit-learn's digits: 1,797 grey images of 8x8 pixels in 10 classes (UCI, Alpaydin & Kaynak 1998), no download."""

import torch

from stn_fx.data.images import ImageSet
from stn_fx.errors import InputError


def load_digits() -> tuple[ImageSet, None, None]:
    """All images; the set has no test part of its own. InputError where scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise InputError(
            "The digits come with scikit-learn, which is not installed. Run: pip install 'stn-fx[examples]'"
        ) from error
    digits = load()
    images = torch.tensor(digits.images).mul(255 / 16).round().byte()  # stored as 0 to 16
    return ImageSet(images.unsqueeze(1), torch.tensor(digits.target).long()), None, None
