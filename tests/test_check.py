"""`stn_fx.check`: passes where the compiled model is right, fails where a rule is wrong, and touches nothing."""

import json
from typing import Any

import pytest
import torch
from models import MLP, MODELS
from rule_cases import CASES, Fn
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import stn_fx
from stn_fx.rules import load_builtin_rules
from stn_fx.rules.linear import LinearRule
from stn_fx.rules.normalization import LayerNormRule

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
CHECKED = (
    "linear", "weight norm, hook", "weight norm, parametrization", "StdConv2d", "batch norm 2d",
    "embedding tied to a decoder", "MHA with dropout", "LSTM cell", "dropout in place", "drop path, timm", "cutout",
    "nested inputs", "a dataclass as output", "keyword inputs, an output of dicts and tuples",
    "F.normalize with a zero row", "transformer encoder layer",
)  # fmt: skip


def single(value: Any) -> Any:
    return pytree.tree_map(lambda t: t.float() if isinstance(t, Tensor) and t.is_floating_point() else t, value)


@pytest.mark.parametrize("name", CHECKED)
def test_it_passes_on(name: str) -> None:
    each = next(case for case in CASES if case.name == name)
    torch.manual_seed(0)
    inputs = single(each.inputs(4))
    result = stn_fx.check(stn_fx.transform(each.build(), each.hparams, inputs), inputs)
    assert result.passed, str(result)
    assert result.precision == "float64"


@pytest.mark.parametrize("name", ["simple_cnn", "vit", "swin_t"])
def test_it_passes_on_whole_models(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]
    inputs = single(model.inputs(4))
    result = stn_fx.check(stn_fx.transform(model.build(), model.hparams, inputs), inputs)
    assert result.passed, str(result)


@pytest.mark.parametrize("j", [0, 1])
def test_an_example_that_no_rate_can_move_is_no_fault(j: int) -> None:
    x = X.clone()
    x[j] = 0.0
    model = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 3))
    result = stn_fx.check(stn_fx.transform(model, "dropout", (x,)), (x,))
    assert result.passed, str(result)


def test_it_touches_nothing() -> None:
    stn = stn_fx.transform(MLP(), "dropout", (X,)).train()
    stn.model.drop.eval()
    state = {name: value.clone() for name, value in stn.state_dict().items() if isinstance(value, Tensor)}
    modes = [module.training for module in stn.modules()]
    compiled, generator, own = stn.compiled, torch.get_rng_state(), stn.generator().get_state()
    stn_fx.check(stn, X)
    assert all(torch.equal(value, state[name]) for name, value in stn.state_dict().items() if name in state)
    assert all(p.grad is None for p in stn.parameters())
    assert [module.training for module in stn.modules()] == modes
    assert stn.compiled is compiled
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(stn.generator().get_state(), own)


def test_a_result_prints_and_serializes() -> None:
    result = stn_fx.check(stn_fx.transform(MLP(), "dropout,weight_decay", (X,)), X)
    assert "passed" in str(result)
    assert "linearized pass" in str(result)
    record = json.loads(json.dumps(result.to_dict()))
    assert record["passed"] is True
    assert set(result.errors) == {each["name"] for each in record["oracles"]}


class WrongResponse(LinearRule):
    def respond(self, emit: Any, node: Any) -> Any:
        return emit.call(torch.mul, super().respond(emit, node), 1.001)


class WrongTangent(LinearRule):
    def linearize(self, emit: Any, node: Any) -> Any:
        primal, tangent = super().linearize(emit, node)
        return primal, emit.call(torch.mul, tangent, 1.001)


class NoGradient(LinearRule):
    def linearize(self, emit: Any, node: Any) -> Any:
        primal, tangent = super().linearize(emit, node)
        return primal, emit.call(torch.Tensor.detach, tangent)


class WrongBase(LayerNormRule):
    def base(self, emit: Any, node: Any) -> Any:
        return emit.call(torch.mul, super().base(emit, node), 1.001)


@pytest.mark.parametrize(
    ("rule", "caught"),
    [
        (WrongResponse, {"unchanged in evaluation", "response pass"}),
        (WrongTangent, {"linearized pass", "training graph"}),
        (WrongBase, {"unchanged in training, all rates zero"}),
    ],
)
def test_a_wrong_rule_is_caught(rule: type, caught: set[str]) -> None:
    registry = load_builtin_rules().copy()
    registry.register(rule)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    result = stn_fx.check(stn_fx.transform(model, "weight_decay", (X,), rules=registry), X)
    assert not result.passed
    assert {each.name for each in result.oracles if not each.passed} == caught
    assert "FAILED" in str(result)


def with_wrong_gradient(x: torch.Tensor) -> torch.Tensor:
    """The value, with a gradient that is too large by a thousandth."""
    return x.detach() + 1.001 * (x - x.detach())


class WrongGradient(LinearRule):
    def respond(self, emit: Any, node: Any) -> Any:
        return emit.call(with_wrong_gradient, super().respond(emit, node))


@pytest.mark.parametrize("right", [True, False])
def test_kinks_neither_raise_an_alarm_nor_hide_a_wrong_gradient(right: bool) -> None:
    """So many rectifiers that a difference of the usual step crosses the kinks of some."""
    registry = load_builtin_rules().copy()
    if not right:
        registry.register(WrongGradient)
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 16, 1), *layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(3, 3, 24, 24)
    stn = stn_fx.transform(model, "dropout, weight_decay", (x,), rules=registry)
    result = stn_fx.check(stn, x)
    failed = {each.name for each in result.oracles if not each.passed}
    assert failed == (set() if right else {"gradients of the hyperparameters"}), str(result)
    if not right:
        assert result.errors["gradients of the hyperparameters"] == pytest.approx(1e-3, rel=0.05)


def test_a_missing_gradient_is_caught() -> None:
    registry = load_builtin_rules().copy()
    registry.register(NoGradient)
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3, bias=False))
    result = stn_fx.check(stn_fx.transform(model, "weight_decay", (X,), rules=registry), X)
    assert not result.passed
    assert any("no gradient" in each.note for each in result.oracles)


def test_a_model_that_insists_on_float32_is_judged_by_that_precision() -> None:
    model = Fn(lambda m, x: m.g(m.f(x).float().softmax(-1).to(x.dtype)), f=nn.Linear(8, 5), g=nn.Linear(5, 3))
    result = stn_fx.check(stn_fx.transform(model, "weight_decay", (X,)), X)
    assert result.precision == "float32"
    assert result.passed, str(result)


def test_inputs_that_are_no_batch_are_refused() -> None:
    with pytest.raises(stn_fx.errors.InputError, match="batch"):
        stn_fx.check(stn_fx.transform(MLP(), "dropout", (X,)), 3)


class Gated(nn.Module):
    """A factor through which no gradient is to flow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x).tanh()
        return self.head(x * x.detach())


def test_what_a_forward_detaches_is_no_false_alarm() -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    assert stn_fx.check(stn_fx.transform(Gated(), "weight_decay", (x,)), x).passed


class Noisy(nn.Module):
    """Draws numbers of its own in training."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop, self.head = nn.Linear(5, 6), nn.Dropout(0.2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x).tanh()
        if self.training:
            x = (x + 0.1 * torch.randn_like(x)) * (1 + 0.1 * torch.rand_like(x))
        return self.head(self.drop(x))


def test_random_numbers_of_the_models_own_are_no_false_alarm() -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    stn = stn_fx.transform(Noisy(), "dropout,weight_decay", (x,))
    before = torch.get_rng_state()
    assert stn_fx.check(stn, x).passed
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_that_writes_into_its_input_is_judged_on_what_it_was_given():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            x.add_(1)
            return self.linear(x)

    x = torch.randn(4, 3)
    given = x.clone()
    result = stn_fx.check(stn_fx.transform(Writing(), "weight_decay", (x.clone(),)), x)
    assert result.passed, str(result)
    assert torch.equal(x, given)
