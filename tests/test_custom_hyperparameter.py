"""Hyperparameters of the user's own: the example, exactness, emitted code, and what is said about mistakes."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import stn_fx
from stn_fx.compiler.emit import source
from stn_fx.errors import InputError, StnError

EXAMPLE = Path(__file__).parents[1] / "examples" / "custom_hyperparameter.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("custom_hyperparameter", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_hyperparameter"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["custom_hyperparameter"]


def wrapped(hparams):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    x = torch.rand(5, 1, 6, 6, dtype=torch.float64)
    return stn_fx.transform(model.double(), hparams, (x,), seed=0), x


def test_the_example_runs_and_all_its_hyperparameters_move(example):
    values = example.main()
    start = {"gamma_jitter": 0.1, "soft_clip.0": 0.5, "small_scores": 1e-3, "weight_decay": 5e-4}
    assert values.keys() == start.keys()
    assert all(values[name] != pytest.approx(start[name], rel=1e-6) for name in start)


def test_the_tangent_of_an_activation_is_exact(example):
    stn, x = wrapped([example.HPARAMS[1]])
    stn.hparams.raw.data.fill_(0.3)
    with torch.no_grad():
        for parameter in stn.response_parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    raw = stn.hparams.raw.detach().expand(5, -1) + torch.randn(5, 1, dtype=torch.float64)
    level = stn.hparams.constrain(raw).reshape(-1, 1, 1, 1)
    primal, tangent = stn.linearize(x, raw=raw)
    for i in range(5):
        clipped = nn.Sequential(stn.model[0], Clip(level[i : i + 1]), *stn.model[1:])
        change = stn.weight_response(raw[i] - stn.hparams.raw.detach())
        moved = {name.replace("4.", "5."): value for name, value in change.items()}
        expected = torch.func.jvp(
            lambda p, i=i, m=clipped: torch.func.functional_call(m, p, (x[i : i + 1],)),
            ({name: value.detach() for name, value in clipped.named_parameters()},),
            (moved,),
        )
        torch.testing.assert_close((primal[i : i + 1], tangent[i : i + 1]), expected)


class Clip(nn.Module):
    def __init__(self, level):
        super().__init__()
        self.level = level

    def forward(self, x):
        return torch.tanh(x * self.level) / self.level


def test_random_numbers_of_an_activation_are_the_same_in_primal_and_tangent():
    def mask(x, rate, draws):
        return x * (draws.uniform(x.shape, x, "mask") >= rate)

    stn, x = wrapped([stn_fx.CustomHyperparameter("mask", mask, "activation", 0.4, at="3")])
    with torch.no_grad():
        stn.responses()["0.weight"].U.normal_(generator=torch.Generator().manual_seed(1))
    stn.model[4].weight.data = torch.eye(4, dtype=torch.float64)[:3]
    stn.model[4].bias.data.zero_()
    primal, tangent = stn.linearize(x, raw=torch.randn(5, 1, dtype=torch.float64))
    # Where the mask drops a feature, its score and its tangent vanish together.
    assert torch.equal(primal == 0, tangent == 0)
    assert 0 < (primal == 0).sum() < primal.numel()
    assert stn.hparams.names == ("mask.3",)


def test_emitted_code_names_the_function(example):
    stn, _ = wrapped(example.HPARAMS)
    text = source(stn.compiled, stn, "net_stn")
    assert "'custom_hyperparameter:gamma_jitter'" in text
    assert text.count("'custom_hyperparameter:soft_clip'") == 3  # base, primal, tangent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "a b", "acts_on": "loss"}, "cannot be named"),
        ({"name": "a", "acts_on": "weights"}, "none of input"),
        ({"name": "a", "acts_on": "activation"}, "say of which modules"),
        ({"name": "a", "acts_on": "loss", "at": "layer"}, "not usable"),
        ({"name": "a", "acts_on": "loss", "apply": 3}, "pass a function"),
        ({"name": "a", "acts_on": "input", "apply": lambda x, value: x}, r"called with \(x, value, draws\)"),
        ({"name": "a", "acts_on": "loss", "apply": lambda x: x}, r"called with \(output, target, value\)"),
        (
            {"name": "a", "acts_on": "input", "initial": 2.0, "apply": lambda x, v, d: x},
            "not strictly between its bounds 0 and 1",
        ),
        ({"name": "a", "acts_on": "input", "initial": float("nan"), "apply": lambda x, v, d: x}, "not finite"),
        ({"name": "a", "acts_on": "input", "scale": 0.0, "apply": lambda x, v, d: x}, "scale"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(StnError, match=message):
        stn_fx.CustomHyperparameter(**({"apply": torch.add, "initial": 0.1} | arguments))


def test_results_of_the_wrong_form():
    stn, x = wrapped([stn_fx.CustomHyperparameter("half", lambda x, v, d: x[:, :, ::2], "input", 0.5)])
    with pytest.raises(InputError, match="must return a tensor like its input"):
        stn(x)
    stn, x = wrapped([stn_fx.CustomHyperparameter("term", lambda o, t, v: o, "loss", 0.5)])
    with pytest.raises(InputError, match="one term for each"):
        stn_fx.DeltaSTN(stn).inner_step((x, torch.zeros(5, dtype=torch.int64)))
    with pytest.raises(InputError, match="already"):
        wrapped([stn_fx.CustomHyperparameter("dropout", lambda x, v, d: x, "input", 0.5)])


def test_the_perturbed_network_is_augmented_as_the_base_pass_is(example):
    """With a response of zero both are the model in training mode at the same random numbers."""
    stn, x = wrapped([*example.HPARAMS, "gaussian_noise", "rotation", "cutout"])
    raw = stn.hparams.raw.detach()
    with torch.no_grad():
        for parameter in stn.response_parameters():
            parameter.zero_()
    stn.generator().manual_seed(3)
    base = stn(x)
    stn.generator().manual_seed(3)
    torch.testing.assert_close(stn.respond_in_training(x, raw=raw), base)
    assert not torch.allclose(base, stn.model(x))
