"""What cannot be compiled: each error names the place and the remedy, and the user's module is as it was."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import fingerprint
from rule_cases import Fn
from torch import Tensor, nn

import stn_fx
from stn_fx.errors import BatchLayoutError, CaptureError, InputError, StnError

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """Norm, dropout and a hook around a forward of the case's own; the norm is held in evaluation mode."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.norm, self.drop, self.layer = nn.BatchNorm1d(6).eval(), nn.Dropout(0.2), nn.Linear(6, 3)
        self.bias = nn.Parameter(torch.zeros(8, 3))
        self.own = Fn(forward)
        self.layer.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.own.function(self, self.layer(self.drop(self.norm(x))), *args, **kwargs)


def branch(m: nn.Module, y: Tensor) -> Tensor:
    return y if y.sum() > 0 else -y


def loop(m: nn.Module, y: Tensor) -> Tensor:
    return torch.stack([row.tanh() for row in y])


def mixes(m: nn.Module, y: Tensor) -> Tensor:
    return y - y.mean(0)


REFUSED = {
    "a branch on values": (branch, (X,), CaptureError, r"(?s)at the model itself \(.*test_bad_input.py:\d+.*Remedy"),
    "an example of the wrong dtype": (lambda m, y: y, (X.double(),), CaptureError, "(?s)does not run.*at norm.*dtype"),
    "an example of integers": (lambda m, y: y, (X.long(),), CaptureError, "(?s)does not run.*at norm.*dtype"),
    "an example of the wrong shape": (lambda m, y: y, (X[:, :5],), CaptureError, "(?s)does not run.*at norm.*shape"),
    "an example without elements": (lambda m, y: y, (X[:0],), InputError, r"example_inputs\[0\] holds no elements"),
    "an array of numpy": (lambda m, y: y, (X.numpy(),), InputError, r"example_inputs\[0\] is a ndarray"),
    "no tensor at all": (lambda m, y: y, (3,), InputError, "no tensor with a batch axis"),
    "an object as argument": (
        lambda m, y, options: y,
        (X, types.SimpleNamespace(gain=2)),
        InputError,
        r"example_inputs\[1\] is a SimpleNamespace.*register",
    ),
    "an object as keyword argument": (
        lambda m, y, options: y,
        {"x": X, "options": object()},
        InputError,
        r"example_inputs\['options'\] is a object",
    ),
    "a view of a fixed batch": (
        lambda m, y: y.view(8, -1),
        (X,),
        CaptureError,
        r"(?s)fixes the batch size to 8, at .*test_bad_input.py.*x\.shape\[0\]",
    ),
    "a parameter of the size of the batch": (lambda m, y: y + m.bias, (X,), CaptureError, "fixes the batch size to 8"),
    "a loop over examples": (loop, (X,), CaptureError, "(?s)fixes the batch size to 8.*loop over the examples"),
    "a string as output": (lambda m, y: "done", (X,), CaptureError, r"no floating tensor \(a str\).*Remedy"),
    "nothing as output": (lambda m, y: None, (X,), CaptureError, "no floating tensor"),
    "a number as output": (lambda m, y: y.sum().item(), (X,), CaptureError, r"no floating tensor \(a float\)"),
    "classes as output": (lambda m, y: y.argmax(-1), (X,), CaptureError, r"a tensor of torch.int64.*logits"),
    "an object as output": (
        lambda m, y: types.SimpleNamespace(logits=y),
        (X,),
        CaptureError,
        "it is a SimpleNamespace.*Remedy",
    ),
    "an object in the output": (
        lambda m, y: (y, {"rest": object()}),
        (X,),
        CaptureError,
        r"\[1\]\['rest'\] is a object.*Remedy",
    ),
    "a mean over the batch as output": (lambda m, y: y.mean(), (X,), BatchLayoutError, "Return one row per example"),
    "examples that depend on each other": (mixes, (X,), BatchLayoutError, "not independent.*batch_axis"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_the_model_as_it_was(name: str) -> None:
    forward, example, error, message = REFUSED[name]
    model = Model(forward)
    before, generator, hooks = fingerprint(model), torch.get_rng_state(), dict(model.layer._forward_hooks)
    length = len
    with pytest.raises(error, match=message):
        stn_fx.transform(model, "dropout,weight_decay", example)
    assert fingerprint(model) == before
    assert model.layer._forward_hooks == hooks
    assert torch.equal(torch.get_rng_state(), generator)
    assert len is length
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.ReLU()), "has no parameters"),
        (nn.Linear(6, 3).requires_grad_(False), "frozen"),
        (nn.Sequential(nn.LazyLinear(3)), r"0.weight, 0.bias of Sequential have no shape yet"),
    ],
    ids=["no parameters", "all frozen", "lazy"],
)
def test_nothing_to_train(model: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        stn_fx.transform(model, "weight_decay", (X,))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_part_is_named() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(6, 3)), nn.Linear(3, 2))
    with pytest.raises(CaptureError, match=r"0 of Sequential is a torch.jit.ScriptModule.*Remedy"):
        stn_fx.transform(model, "weight_decay", (X,))


def test_a_later_batch_that_does_not_fit_is_refused_and_the_captured_ones_go_on() -> None:
    stn = stn_fx.transform(nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.1)), "dropout", (X,)).train()
    parameters = [id(p) for p in stn.parameters()]
    for bad in (X.double(), X[:, :5], X.long()):
        with pytest.raises(StnError, match="does not run on the example inputs"):
            stn(bad)
    assert stn(X).shape == (8, 3)
    assert [id(p) for p in stn.parameters()] == parameters


@pytest.mark.parametrize("mode", ["upper", 2.5, None, True])
def test_constants_are_inputs_and_a_new_value_is_captured_anew(mode: Any) -> None:
    model = Fn(lambda m, x, mode: m.f(x) * (2 if mode == "lower" else 3), f=nn.Linear(6, 3))
    stn = stn_fx.transform(model, "weight_decay", (X, "lower")).eval()
    torch.testing.assert_close(stn.respond(X, "lower"), model(X, "lower"))
    torch.testing.assert_close(stn.respond(X, mode), model(X, mode))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda stn, x: stn.respond(x, raw=[0.0, 0.0]), "raw must be a tensor of torch.float32 on cpu.*not list"),
        (lambda stn, x: stn.respond(x, raw=torch.zeros(8, 2).double()), "not torch.float64 on cpu"),
        (lambda stn, x: stn.linearize(x, raw=torch.zeros(7, 2)), r"not \(8, 2\): one row per example"),
        (lambda stn, x: stn.weight_response(torch.zeros(3)), r"delta has shape \(3,\), not \(2,\)"),
        (lambda stn, x: stn.weight_response([0.0, 0.0]), "delta must be a tensor"),
        (lambda stn, x: stn_fx.transform(stn.model, seed="a"), "seed='a' must be a whole number"),
        (lambda stn, x: stn_fx.transform(stn.model, rules="conv"), "rules is a str; pass a registry"),
        (lambda stn, x: stn_fx.transform(stn.model, response="full"), "neither 'rowwise' nor RowWise"),
        (lambda stn, x: stn_fx.RowWise(0), "terms=0"),
    ],
)
def test_arguments_of_the_wrong_kind(call: Callable[..., Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.1), nn.Linear(4, 3))
    stn = stn_fx.transform(model, "dropout,weight_decay", (X,), seed=0)
    with pytest.raises(InputError, match=message):
        call(stn, X)
