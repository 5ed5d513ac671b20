"""The report tells what was done with every parameter and site, and what an update will cost."""

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import stn_fx
from stn_fx.bilevel.response_step import usual_step
from stn_fx.compiler.cost import predict_cost


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.drop = nn.Dropout(0.2)
        self.unused = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.frozen(self.normed(self.drop(x)))


@pytest.fixture(scope="module")
def stn() -> stn_fx.SelfTuningModule:
    torch.manual_seed(0)
    return stn_fx.transform(Net(), "dropout,weight_decay", (torch.randn(4, 8),), seed=0)


def test_every_parameter_is_in_it_once_with_rule_or_reason(stn: stn_fx.SelfTuningModule) -> None:
    report = stn.report
    names = [row.name for row in report.parameters if not row.effective_weight]
    assert sorted(names) == sorted(name for name, _ in stn.model.named_parameters())
    assert all(row.rule or row.through for row in report.parameters if row.conditioned)
    assert set(report.unconditioned) == {"unused", "frozen.weight", "frozen.bias"}
    assert all(report.unconditioned.values())


def test_effective_weights_count_through_the_parameters_they_cover(stn: stn_fx.SelfTuningModule) -> None:
    report = stn.report
    own = 5 * 72 + 8  # four layers and a weight-normed one with 8 magnitudes
    assert report.totals.conditioned == own
    assert report.totals.trainable == own + 3
    assert report.conditioned_share == pytest.approx(own / (own + 3))
    covered = next(row for row in report.parameters if row.name == "normed.parametrizations.weight.original1")
    assert covered.through == ("normed.weight",)


def test_response_size_is_what_is_there(stn: stn_fx.SelfTuningModule) -> None:
    totals = stn.report.totals
    there = list(stn.response_parameters())
    assert totals.response_scalars == sum(p.numel() for p in there)
    assert totals.response_bytes == 4 * totals.response_scalars
    assert totals.response_scalars == sum(row.response_scalars for row in stn.report.parameters)


def test_hyperparameters_have_bounds_start_and_current_value(stn: stn_fx.SelfTuningModule) -> None:
    with torch.no_grad():
        stn.hparams.set_values({"dropout.drop": 0.4})
    rows = {row.name: row for row in stn.report.hyperparameters}
    assert rows["dropout.drop"].initial == pytest.approx(0.2)
    assert rows["dropout.drop"].value == pytest.approx(0.4)
    assert (rows["dropout.drop"].low, rows["dropout.drop"].high) == (0.0, 0.95)
    assert rows["dropout.drop"].acts_at == ("drop",)
    assert rows["weight_decay"].acts_at == ()


def test_it_is_jsonable_and_prints_compactly(stn: stn_fx.SelfTuningModule) -> None:
    report = stn.report
    told = json.loads(json.dumps(report.to_dict()))
    assert len(told["parameters"]) == len(report.parameters)
    text = str(report)
    assert "layers.*.weight (4)" in text
    assert "unused" in text
    assert "requires_grad" in text
    assert "% )" not in text
    assert "the training loss" in text


def test_folded_batches_are_told() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.reshape(-1, 4)).reshape(x.shape)

    torch.manual_seed(0)
    report = stn_fx.transform(Windows(), "weight_decay", (torch.randn(3, 5, 4),)).report
    assert "batch-major" in next(row.batch_layout for row in report.parameters if row.name == "linear.weight")


@pytest.mark.parametrize(("response", "matmul"), [("rowwise", 8 / 3), (stn_fx.LowRank(2), 2.0)])
def test_matrix_products_cost_what_the_design_says(response: str | stn_fx.LowRank, matmul: float) -> None:
    layers = [nn.Linear(256, 256) for _ in range(12)]
    stn = stn_fx.transform(nn.Sequential(*layers), "weight_decay", (torch.randn(64, 256),), response=response)
    cost = predict_cost(stn.compiled, stn)
    # The first layer needs no gradient of its input, and the response is small beside the weights.
    assert cost.matmul_ratio == pytest.approx(matmul, rel=0.03)
    assert cost.ratio > 1.5
    alone = cost.base.equivalent_flops / cost.ordinary.equivalent_flops
    step = usual_step()
    passes = 2 * step.step.fraction / step.k
    assert cost.default_ratio == pytest.approx(alone + passes * (cost.ratio - alone))
    assert predict_cost(stn.compiled, stn, 4096).batch_size == 4096


def test_prediction_leaves_the_model_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).eval()
    model[1].train()
    stn = stn_fx.transform(model, "weight_decay", (torch.randn(3, 3, 8, 8),))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    assert stn.report.cost is not None
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in stn.parameters())
