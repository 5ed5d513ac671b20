"""What once went wrong without a word: each is now right, or refused with the place and the remedy."""

from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models import MLP
from stn_fx_cli.main import app
from torch import Tensor, nn
from typer.testing import CliRunner

import stn_fx
from stn_fx.compiler.emit import emit
from stn_fx.compiler.proof import prove
from stn_fx.errors import InputError, StnError

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(self.layer(x)) * self.gain, n=6)


class TwoMade(nn.Module):
    """Two weights made in one module, beside an unrelated parameter that bears the usual name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.rand(6, 4)), nn.Parameter(torch.rand(4, 6))
        self.weight = nn.Parameter(torch.rand(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear((x @ torch.tanh(self.a)).sin() @ torch.tanh(self.b), self.weight)


class Standardised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        return F.linear(x, (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True), self.bias)


class Eigenvalues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(torch.diag_embed((self.w.exp() * x).cumsum(-1)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * self.gate(x).detach()


def transformed(model: nn.Module, hparams: str = "weight_decay,label_smoothing") -> stn_fx.SelfTuningModule:
    torch.manual_seed(0)
    return stn_fx.transform(model.double(), hparams, (X,), seed=0)


@pytest.mark.parametrize("model", [Spectrum, TwoMade, Standardised, Eigenvalues])
def test_the_oracles_hold(model: type[nn.Module]) -> None:
    torch.manual_seed(0)
    stn = transformed(model(6, 3) if model is Standardised else model())
    result = stn_fx.check(stn, X)
    assert result.passed, str(result)


def test_weights_made_in_one_module_have_responses_of_their_own() -> None:
    assert set(transformed(TwoMade()).responses()) == {"weight", "weight_2", "weight_3"}


def test_decay_leaves_out_what_is_no_change_of_the_parameter() -> None:
    stn = transformed(Standardised(6, 3))
    for parameter in stn.response_parameters():
        parameter.data.normal_()
    raw = stn.hparams.raw.detach() + torch.ones(2, 2, dtype=torch.float64)
    assert torch.allclose(stn.squared_norm(raw), stn.squared_norm())


def test_what_no_gradient_reaches_is_not_conditioned() -> None:
    stn = transformed(Gated())
    assert set(stn.responses()) == {"value.weight", "value.bias"}
    assert "behind a detach" in str(stn.report.to_dict())


def test_a_changed_model_is_captured_anew() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.0), nn.ReLU(), nn.Linear(6, 3))
    stn = transformed(model, "weight_decay").train()
    model[2] = nn.Tanh()
    assert torch.allclose(stn(X), model(X))
    model[0].register_forward_hook(lambda module, inputs, output: output * 5)
    assert torch.allclose(stn(X), model(X))
    model[1].p = 1.0
    assert torch.allclose(stn(X), model[3].bias.expand(5, 3))
    model[3] = nn.Linear(6, 4).double()
    with pytest.raises(StnError, match=r"3\.weight"):
        stn(X)


def test_a_lazy_model_is_refused_and_left_alone() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(InputError, match="Run the model once"):
        stn_fx.transform(model, "weight_decay", (X.float(),))
    assert model(X.float()).shape == (5, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stn_fx.transform(MLP(), {"dropout": 0.5}), r"dropout\(initial=0.5\)"),
        (lambda: stn_fx.LowRank(0), "positive whole number"),
        (lambda: stn_fx.check(MLP(), X), "stn_fx.transform"),
    ],
)
def test_arguments(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]


def test_convert_does_not_overwrite_what_it_did_not_write(tmp_path: Path) -> None:
    path = tmp_path / "ok.py"
    path.write_text(
        "from torch import nn\n\nclass Net(nn.Linear):\n    def __init__(self):\n        super().__init__(4, 3)\n"
    )
    before = path.read_text()
    result = CliRunner().invoke(app, ["convert", str(path), "--input-shape", "4", "--out", str(path)])
    assert result.exit_code == 1
    assert "was not written by stn-fx" in " ".join(result.stderr.split())
    assert path.read_text() == before
    made = tmp_path / "made.py"
    for _ in range(2):  # its own file it may replace
        assert CliRunner().invoke(app, ["convert", str(path), "--out", str(made), "--input-shape", "4"]).exit_code == 0
    assert (
        CliRunner().invoke(app, ["convert", str(path), "--out", str(path / "x.py"), "--input-shape", "4"]).exit_code
        == 1
    )


@pytest.mark.parametrize("axis", [7, -1, True, "0", 1.5])
def test_a_batch_axis_that_is_none_is_named(axis: object) -> None:
    with pytest.raises(InputError, match="batch_axis="):
        stn_fx.transform(nn.Linear(6, 3).double(), "weight_decay", (X,), batch_axis=axis)  # type: ignore[arg-type]


def test_a_model_whose_settings_go_on_changing_keeps_a_few_captures_and_says_so() -> None:
    model = nn.Sequential(nn.Linear(6, 3)).double()
    stn = transformed(model).train()
    for step in range(7):
        model[0].temperature = float(step)
        stn(X)
    model[0].temperature = 7.0
    with pytest.warns(UserWarning, match=r"captured anew.*0.temperature changed. Keep .* in a tensor"):
        stn(X)
    assert len(stn._captures) == 8


def test_inputs_whose_shape_goes_on_changing_are_said() -> None:
    stn = transformed(nn.Linear(6, 3).double()).train()
    for length in range(2, 9):
        stn(X.unsqueeze(1).expand(5, length, 6))
    with pytest.warns(UserWarning, match="the inputs have another shape or structure.*pad to a multiple"):
        stn(X.unsqueeze(1).expand(5, 9, 6))


class OddlyNamed(nn.Module):
    """Inputs named like tables and functions of the code that is emitted."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(6, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, state: Tensor, response: Tensor, torch: Tensor, delta_1: Tensor, *, draws: Tensor) -> Tensor:
        return self.head(self.recurrent(state, response)[0][:, -1] * torch) + delta_1 * draws


def test_inputs_may_have_any_name(tmp_path: Path) -> None:
    made = torch.Generator().manual_seed(0)
    shapes = {"state": (4, 2, 6), "response": (1, 4, 6), "torch": (4, 6), "delta_1": (4, 3), "draws": (4, 3)}
    inputs = {name: torch.randn(shape, generator=made).double() for name, shape in shapes.items()}
    stn = stn_fx.transform(
        OddlyNamed().double(), "weight_decay,input_dropout@state", inputs, batch_axis=(0, 1, 0, 0, 0)
    )
    assert stn_fx.check(stn, inputs).passed
    written = emit(stn.compiled, stn, tmp_path / "oddly_named.py")
    assert prove(written.module, stn.compiled, stn).passed


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.rates.__setitem__(0, 0.0),
        lambda m: m.options.__setitem__("scale", 3.0),
        lambda m: setattr(m, "pair", (2.0, None)),
        lambda m: setattr(m.config, "shift", 5.0),
        lambda m: setattr(m, "act", torch.relu),
        lambda m: setattr(m, "kind", Kind.NEGATIVE),
    ],
    ids=["list", "dictionary", "tuple", "namespace", "function", "enumeration"],
)
def test_settings_of_any_kind_are_not_baked_in(change) -> None:
    class Configured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.rates, self.options, self.pair = [0.5], {"scale": 1.0}, (1.0, None)
            self.config = SimpleNamespace(shift=0.0, names=["a"], torch=torch)
            self.act, self.kind = torch.tanh, Kind.POSITIVE

        def forward(self, x: Tensor) -> Tensor:
            sign = 1 if self.kind is Kind.POSITIVE else -1
            x = self.act(self.linear(x)) * sign * self.pair[0] * self.options["scale"] + self.config.shift
            return x * (1 - self.rates[0])

    model, x = Configured(), torch.randn(4, 3)
    stn = stn_fx.transform(model, "weight_decay", (x,)).train()
    torch.testing.assert_close(stn(x), model(x))
    change(model)
    torch.testing.assert_close(stn(x), model(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.inner, "shift", torch.full((3,), 5.0)),
        lambda m: setattr(m.inner, "shift", torch.full((1,), 5.0)),
        lambda m: m.inner.shift.add_(1.0),
    ],
    ids=["another", "of another shape", "in place"],
)
def test_a_tensor_that_is_a_plain_attribute_is_read_where_it_is(change) -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = torch.zeros(3)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift + torch.tensor([1.0, 2.0, 3.0])

    model, x = nn.Sequential(), torch.randn(4, 3)
    model.add_module("linear", nn.Linear(3, 3))
    model.add_module("inner", Shift())
    stn = stn_fx.transform(model, "weight_decay", (x,)).train()
    for _ in range(2):
        for output in (stn(x), stn.respond(x), stn.linearize(x)[0]):
            torch.testing.assert_close(output, model(x))
        change(model)


def test_a_module_that_torch_compile_has_wrapped_is_refused() -> None:
    model = nn.Sequential(torch.compile(nn.Linear(3, 3)), nn.Linear(3, 2))
    for each in (model, torch.compile(nn.Linear(3, 3))):
        with pytest.raises(InputError, match=r"before torch\.compile"):
            stn_fx.transform(each, "weight_decay", (torch.randn(4, 3),))


class Kind(Enum):
    POSITIVE = 1
    NEGATIVE = 2


def test_an_empty_batch_is_refused() -> None:
    x, y = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    steps = stn_fx.DeltaSTN(stn_fx.transform(nn.Linear(3, 2), "weight_decay", (x,)))
    for step in (steps.inner_step, steps.outer_step):
        with pytest.raises(InputError, match="no examples"):
            step((x[:0], y[:0]))


def test_models_that_draw_for_themselves_leave_the_generator_alone() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x + torch.randn_like(x)) if self.training else self.linear(x)

    model, before = Noisy(), torch.get_rng_state()
    stn_fx.transform(model, "weight_decay", (torch.ones(4, 3),))
    assert torch.equal(torch.get_rng_state(), before)
