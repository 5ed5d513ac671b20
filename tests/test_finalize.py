"""Tuned rates go where the model keeps them, and what has no place is told."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import stn_fx
from stn_fx.compiler.finalize import write_rates


class Block(nn.Module):
    def __init__(self, rate: float = 0.3) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.drop_rate = rate
        self.channel = nn.Dropout1d(0.1)
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.linear(x), self.drop_rate, self.training)
        x = self.channel(x)
        return x + self.attention(x, x, x, need_weights=False)[0]


def compiled(model: nn.Module, hparams: str, *shape: int) -> stn_fx.SelfTuningModule:
    torch.manual_seed(0)
    return stn_fx.transform(model, hparams, (torch.randn(shape),), seed=0)


def test_modules_attention_and_functional_dropout_take_their_own_rate() -> None:
    model = Block()
    stn = compiled(model, "dropout", 3, 4, 6)
    values = {name: 0.5 + 0.05 * i for i, name in enumerate(stn.hparams.names)}
    finalized = write_rates(model, stn.compiled.plan, values)
    assert not finalized.without_place
    assert set(finalized.written) == {"channel.p", "attention.dropout", "drop_rate"}
    assert {model.channel.p, model.attention.dropout, model.drop_rate} == set(values.values())
    assert model.channel.p == values["dropout.channel"]
    assert model.attention.dropout == values["dropout.attention"]


def test_drop_path_is_written_and_shared_rates_go_everywhere() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), torchvision.ops.StochasticDepth(0.1, "row"), nn.Linear(4, 4),
        torchvision.ops.StochasticDepth(0.2, "row"),
    )  # fmt: skip
    stn = compiled(model, "drop_path(shared)", 3, 4)
    assert stn.hparams.names == ("drop_path",)
    write_rates(model, stn.compiled.plan, {"drop_path": 0.4})
    assert model[1].p == model[3].p == 0.4


def test_what_has_no_place_is_told_with_the_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    stn = compiled(model, "dropout,cutout,weight_decay", 3, 3, 8, 8)
    finalized = write_rates(model, stn.compiled.plan, stn.hparams.values())
    assert not finalized.written
    assert set(finalized.without_place) == set(stn.hparams.names)
    assert "inserted" in finalized.without_place["dropout.3"]
    assert "input" in finalized.without_place["cutout.holes"]
    assert "loss" in finalized.without_place["weight_decay"]
    assert "weight_decay" in str(finalized)


def test_an_ambiguous_functional_dropout_is_not_guessed() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop_a, self.drop_b = nn.Linear(4, 4), 0.2, 0.2

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(self.linear(x), self.drop_a, self.training)
            return F.dropout(self.linear(x), self.drop_b, self.training)

    model = nn.Sequential(Two())
    stn = compiled(model, "dropout", 3, 4)
    finalized = write_rates(model, stn.compiled.plan, dict.fromkeys(stn.hparams.names, 0.6))
    assert not finalized.written
    assert len(finalized.without_place) == 2
    assert model[0].drop_a == model[0].drop_b == 0.2


def test_finalize_of_the_wrapper_returns_the_users_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 2))
    stn = compiled(model, "dropout", 3, 4)
    stn.hparams.set_values({"dropout.1": 0.35})
    assert stn.finalize() is model
    assert model[1].p == pytest.approx(0.35, rel=1e-5)
