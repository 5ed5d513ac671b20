"""Selections that overlap: the more specific one acts, and what is ambiguous is refused."""

import pytest
import torch
from torch import nn

import stn_fx
from stn_fx.errors import InputError


def made(hparams: str) -> stn_fx.SelfTuningModule:
    return stn_fx.transform(Wrapped(), hparams, (torch.randn(3, 6),))


class Wrapped(nn.Module):
    """Three dropouts: stem.1, body.0.1, body.1.1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.1))
        self.body = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.1)) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.stem(x))


@pytest.mark.parametrize("order", ["dropout,dropout@body(initial=0.3)", "dropout@body(initial=0.3),dropout"])
def test_a_pattern_acts_instead_of_a_selection_without_one(order: str) -> None:
    stn = made(order)
    values = stn.hparams.values()
    assert values == pytest.approx({"dropout.stem.1": 0.1, "dropout.body.0.1": 0.3, "dropout.body.1.1": 0.3})
    assert "dropout@body(initial=0.3) acts instead of dropout at 2 sites" in stn.report.notes
    assert all(len(site.hyperparameters) == 1 for site in stn.report.sites)


def test_shared_rates_beside_single_ones() -> None:
    stn = made("dropout(shared),dropout@body.1(initial=0.4)")
    assert stn.hparams.values() == pytest.approx({"dropout": 0.1, "dropout.body.1.1": 0.4})
    acting = {site.name: site.hyperparameters for site in stn.report.sites}
    assert acting == {"stem.1": ("dropout",), "body.0.1": ("dropout",), "body.1.1": ("dropout.body.1.1",)}


def test_a_shared_pattern_beside_a_shared_rate() -> None:
    stn = made("dropout(shared),dropout@body(shared)")
    acting = {site.name: site.hyperparameters for site in stn.report.sites}
    assert acting == {"stem.1": ("dropout",), "body.0.1": ("dropout@body",), "body.1.1": ("dropout@body",)}


def test_two_patterns_for_one_site_are_refused() -> None:
    with pytest.raises(InputError, match=r"dropout@body and dropout@body.0 both choose body.0.1.*do not overlap"):
        made("dropout@body,dropout@body.0")


def test_a_selection_that_is_left_without_a_site_is_refused() -> None:
    with pytest.raises(InputError, match="'dropout' acts nowhere"):
        made("dropout,dropout@**")


def test_the_same_selection_twice_is_refused() -> None:
    with pytest.raises(InputError, match="chosen before"):
        made("dropout,dropout")
