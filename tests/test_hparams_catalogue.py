"""The catalogue's entries and how they resolve to numbers."""

import math

import pytest
import torch

from stn_fx.errors import InputError, OutOfBoundsError, UnknownHyperparameterError
from stn_fx.hparams import CATALOGUE, Catalogue, HyperparameterSpace, SiteContext, parse_hparams, resolve

IMAGE = SiteContext(image_size=(32, 32))


def resolved(text, context=IMAGE, place=None):
    (selection,) = parse_hparams(text)
    return {each.component: each for each in resolve(selection, context, place)}


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (5, 7), (28, 28), (224, 160)])
@pytest.mark.parametrize("entry", list(CATALOGUE), ids=lambda entry: entry.name)
def test_every_entry_starts_inside_with_a_gradient_and_can_be_switched_off(entry, size):
    assert entry.description
    assert entry.source
    for own_rate in (None, 0.0, 0.3, 0.95, 1.0):
        (selection,) = parse_hparams(f"{entry.name}(mask_token=1)" if entry.needs == "tokens" else entry.name)
        space = HyperparameterSpace(resolve(selection, SiteContext(own_rate, size), "layer"))
        raw = space.raw.detach().requires_grad_()
        relative = torch.autograd.grad(space.constrain(raw).sum(), raw)[0] / space.high_H
        assert (relative > 1e-4).all()
        with torch.no_grad():
            space.raw.fill_(-50.0)
        assert all(value < 1e-15 for value in space.values().values())


def test_own_rates():
    assert resolved("dropout", SiteContext(own_rate=0.3))["rate"].initial == 0.3
    assert resolved("dropout", SiteContext(own_rate=0.0))["rate"].initial == 0.05
    assert resolved("dropout(initial=0.2)", SiteContext(own_rate=0.3))["rate"].initial == 0.2
    assert resolved("dropout(high=0.2)", SiteContext(own_rate=0.5))["rate"].initial == pytest.approx(0.18)


def test_cutout_follows_the_image():
    cutout = resolved("cutout")
    assert (cutout["length"].low, cutout["length"].high, cutout["length"].initial) == (0.0, 24.0, 4.0)
    assert (cutout["holes"].low, cutout["holes"].high, cutout["holes"].initial) == (0.0, 4.0, 1.0)
    assert cutout["length"].discrete
    assert cutout["holes"].discrete
    assert resolved("cutout", SiteContext(image_size=(28, 40)))["length"].high == 21.0
    with pytest.raises(InputError, match=r"cutout\.length depends on the size of the image"):
        resolved("cutout", SiteContext())
    assert resolved("cutout(length=0..8, length.initial=4)", SiteContext())["length"].initial == 4.0


def test_defaults_move_inside_narrower_bounds():
    cutout = resolved("cutout(length=5..7, holes=1..3)")
    assert 5 < cutout["length"].initial < 7
    assert 1 < cutout["holes"].initial < 3
    decay = resolved("weight_decay(low=0.01, high=inf)")["coefficient"]
    assert 0.01 < decay.initial < math.inf


def test_names_read_back():
    def full(text, place=None):
        return [each.name for each in resolved(text, place=place).values()]

    assert full("dropout", "layer1.0") == ["dropout.layer1.0"]
    assert full("dropout(shared)", "layer1.0") == ["dropout"]
    assert full("dropout@layer*(shared)", "layer1.0") == ["dropout@layer*"]
    assert full("dropout@layer*", "layer1.0") == ["dropout.layer1.0"]
    assert full("cutout") == ["cutout.holes", "cutout.length"]
    assert full("weight_decay", "ignored") == ["weight_decay"]


@pytest.mark.parametrize(
    "text", ["dropout(high=1.5)", "dropout(low=-0.1)", "weight_decay(low=-1)", "dropout(initial=0.97)"]
)
def test_meaningless_values(text):
    with pytest.raises(OutOfBoundsError, match=r"dropout|weight_decay"):
        resolved(text)


def test_unusable_bounds():
    with pytest.raises(InputError, match="no value lies between"):
        resolved("dropout(low=0.99)")
    with pytest.raises(InputError, match="not integers"):
        resolved("cutout(holes=0.5..3)")
    assert not resolved("cutout(holes=0.5..3, holes.discrete=false)")["holes"].discrete


def test_the_catalogue_is_an_object_that_grows():
    mine = Catalogue(CATALOGUE)
    entry = CATALOGUE["dropout"]
    with pytest.raises(InputError, match="already"):
        mine.register(entry)
    with pytest.raises(UnknownHyperparameterError, match="weight_decay"):
        mine["nothing"]
    assert len(mine) == len(CATALOGUE)
    assert "dropout" in mine
