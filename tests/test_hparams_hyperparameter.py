"""What a user may say in a `Hyperparameter`, and how the rest is refused."""

import math
import pickle

import numpy as np
import pytest
import torch

from stn_fx.errors import InputError, OutOfBoundsError, StnError
from stn_fx.hparams import Hyperparameter


def test_settings_default_to_the_catalogue():
    h = Hyperparameter("dropout")
    assert (h.initial, h.low, h.high, h.scale, h.discrete, h.shared) == (None,) * 6


def test_numbers_become_floats_and_the_object_is_frozen_and_picklable():
    h = Hyperparameter("dropout", initial=np.float32(0.25), high=1, scale=np.int64(2))
    assert (h.initial, h.high, h.scale) == (0.25, 1.0, 2.0)
    assert all(type(value) is float for value in (h.initial, h.high, h.scale))
    assert pickle.loads(pickle.dumps(h)) == h
    with pytest.raises(AttributeError):
        h.initial = 0.3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial": math.nan}, "initial=nan is not finite"),
        ({"low": -math.inf}, "low=-inf is not finite"),
        ({"high": -math.inf}, "high=-inf is not finite"),
        ({"initial": "0.1"}, "initial='0.1' is a str"),
        ({"initial": True}, "is a bool"),
        ({"low": torch.tensor(0.1)}, "is a Tensor"),
        ({"scale": 0.0}, "scale=0 is not positive"),
        ({"scale": -1}, "not positive"),
        ({"low": 0.5, "high": 0.5}, "low=0.5 is not below high=0.5"),
        ({"low": 1.0, "high": 0.5}, "is not below"),
        ({"discrete": 1}, "discrete=1 is not a boolean"),
        ({"shared": "yes"}, "shared='yes' is not a boolean"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        Hyperparameter("dropout", **settings)


@pytest.mark.parametrize("settings", [{"low": 0.1, "initial": 0.1}, {"high": 0.5, "initial": 0.7}])
def test_initial_at_or_outside_a_bound(settings):
    with pytest.raises(OutOfBoundsError, match="not strictly between"):
        Hyperparameter("dropout", **settings)


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_bad_names(name):
    with pytest.raises(StnError, match="name"):
        Hyperparameter(name)


def test_no_upper_bound():
    assert Hyperparameter("weight_decay", high=math.inf).high == math.inf
