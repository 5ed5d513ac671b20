"""Mechanisms that third-party models need, each in the smallest module that shows it (found by the zoo benchmark)."""

import torch
from torch import Tensor, nn

import stn_fx


class PowerIteration(nn.Module):
    """Spectral norm writes its buffers with ``out=``."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class DroppedTable(nn.Module):
    """Dropout on values that depend on parameters only, repeated for every example and head (DeBERTa)."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.table, self.positions = nn.Parameter(torch.randn(6, 4)), nn.Linear(4, 4)
        self.drop, self.output = nn.Dropout(rate), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.positions(self.drop(self.table)).reshape(6, 2, 2).transpose(0, 1)  # heads, positions, features
        queries = x.reshape(x.shape[0], -1, 2, 2).transpose(1, 2).flatten(0, 1)  # examples * heads, length, features
        scores = queries @ keys.repeat(x.shape[0], 1, 1).transpose(1, 2)
        return self.output(scores.reshape(x.shape[0], 2, -1, 6))


class LayerDrop(nn.Module):
    """Whole layers are skipped by a random number that the forward branches on (Wav2Vec2)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not (self.training and torch.rand([]) < 0.5):
                x = layer(x).tanh()
        return x


def test_operators_with_out_become_functional() -> None:
    stn = stn_fx.transform(PowerIteration(), "dropout", (torch.randn(3, 5),))
    before = {name: buffer.clone() for name, buffer in stn.model.named_buffers()}
    stn.train()
    stn.linearize(torch.randn(3, 5))
    assert all(torch.equal(buffer, before[name]) for name, buffer in stn.model.named_buffers())
    stn(torch.randn(3, 5)).sum().backward()
    assert any(not torch.equal(buffer, before[name]) for name, buffer in stn.model.named_buffers())
    assert stn_fx.check(stn, torch.randn(3, 5)).passed


def test_dropout_of_parameters_acts_for_all_examples_alike() -> None:
    x = torch.randn(3, 5, 4)
    stn = stn_fx.transform(DroppedTable(), "dropout", (x,))
    assert stn.hparams.names == ("dropout.output",)
    (site,) = (site for site in stn.report.sites if site.name == "drop")
    assert "for all examples alike" in site.reason
    assert stn.report.conditioned_share == 1
    result = stn_fx.check(stn, x)
    assert result.passed, str(result)


def test_layer_drop_is_captured_with_all_layers_and_told() -> None:
    x = torch.randn(3, 4)
    stn = stn_fx.transform(LayerDrop(), "dropout", (x,))
    assert any("layer drop" in note for note in stn.report.notes)
    result = stn_fx.check(stn, x)
    assert result.passed, str(result)


def test_check_passes_where_a_dropout_is_left_to_its_author() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    result = stn_fx.check(stn_fx.transform(model, "weight_decay", (torch.randn(3, 4),)), torch.randn(3, 4))
    assert result.passed, str(result)


class WithAuxiliary(nn.Module):
    """A second classifier that runs in training only (GoogLeNet, segmentation networks)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x).tanh()
        return self.head(features) + 0.3 * self.auxiliary(features) if self.training else self.head(features)


def test_parameters_of_the_training_pass_alone_are_checked_there() -> None:
    x = torch.randn(3, 4)
    stn = stn_fx.transform(WithAuxiliary(), "dropout", (x,))
    assert stn.report.conditioned_share == 1
    result = stn_fx.check(stn, x)
    assert result.passed, str(result)


class SharedModule(nn.Module):
    """One module in two places (CoaT): two names for each of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = nn.ModuleList([self.first])

    def forward(self, x: Tensor) -> Tensor:
        return self.again[0](self.first(x).tanh())


def test_report_and_check_leave_shared_modules_alone() -> None:
    x = torch.randn(3, 4)
    model = SharedModule()
    weight, value = model.first.weight, model.first.weight.detach().clone()
    stn = stn_fx.transform(model, "weight_decay", (x,))
    assert stn.report.cost is not None
    assert model.first.weight is weight
    result = stn_fx.check(stn, x)
    assert result.passed, str(result)
    assert model.first.weight is weight
    assert torch.equal(model.first.weight, value)
