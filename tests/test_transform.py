"""The facade: a drop-in module that works with torch.func, state dicts, copies and pickles, and says what it cannot."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from models import MLP
from oracles import assert_close, leaves, spread
from torch import Tensor, nn

import stn_fx
from stn_fx.bilevel import DeltaSTN, Linearized
from stn_fx.errors import InputError, StnError, UnknownHyperparameterError

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def made(hparams: Any = "dropout,weight_decay", **options: Any) -> Any:
    torch.manual_seed(0)
    stn = stn_fx.transform(MLP().double(), hparams, (X,), seed=0, **options)
    spread(stn)
    return stn


def raw_of(stn: Any, rows: int = 5) -> Tensor:
    noise = torch.randn(rows, len(stn.hparams), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return stn.hparams.raw.detach() + noise


# ---- a drop-in


def test_evaluation_runs_the_users_module_itself() -> None:
    stn = made().eval()
    assert torch.equal(stn(X), stn.model(X))


def test_the_base_pass_trains_the_users_parameters_alone() -> None:
    stn = made().train()
    stn(X).sum().backward()
    assert all(p.grad is not None for p in stn.base_parameters())
    assert all(p.grad is None for p in stn.response_parameters())
    assert stn.hparams.raw.grad is None


def test_the_linearized_pass_trains_the_response_alone() -> None:
    stn = made().train()
    primal, tangent = stn.linearize(X, raw=raw_of(stn))
    (primal + tangent).sum().backward()
    assert all(p.grad is None for p in stn.base_parameters())
    assert all(p.grad is not None for p in stn.response_parameters())


def test_the_response_pass_has_the_hypergradient() -> None:
    stn = made()
    stn.respond(X).sum().backward()
    assert stn.hparams.raw.grad.abs().sum() > 0


def test_a_fresh_wrapper_is_the_users_model() -> None:
    stn = stn_fx.transform(MLP().double(), "weight_decay", (X,)).eval()
    torch.testing.assert_close(stn.respond(X, raw=raw_of(stn)), stn.model(X), rtol=1e-14, atol=1e-15)
    assert not any(change.any() for change in stn.weight_response(torch.ones(1, dtype=torch.float64)).values())


def test_masks_differ_from_call_to_call_and_repeat_with_the_seed() -> None:
    first, second = made().train(), made().train()
    outputs = [first(X), first(X), second(X)]
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_one_raw_row_serves_every_example() -> None:
    stn = made()
    raw = raw_of(stn)[0]
    assert torch.equal(stn.respond(X, raw=raw), stn.respond(X, raw=raw.expand(5, -1)))


# ---- torch.func


def test_vmap_over_displacements_of_the_response_pass() -> None:
    stn = made()
    raws = torch.stack([raw_of(stn), 2 * raw_of(stn), -raw_of(stn)])
    batched = torch.vmap(lambda raw: stn.respond(X, raw=raw))(raws)
    torch.testing.assert_close(batched, torch.stack([stn.respond(X, raw=raw) for raw in raws]))


def test_vmap_over_displacements_of_the_linearized_pass() -> None:
    stn = made().eval()
    raws = torch.stack([raw_of(stn), 2 * raw_of(stn)])
    _, batched = torch.vmap(lambda raw: stn.linearize(X, raw=raw))(raws)
    torch.testing.assert_close(batched, torch.stack([stn.linearize(X, raw=raw)[1] for raw in raws]))


def test_grad_of_the_response_pass() -> None:
    stn, raw = made(), raw_of(made())
    gradient = torch.func.grad(lambda r: stn.respond(X, raw=r).square().sum())(raw)
    live = raw.clone().requires_grad_()
    stn.respond(X, raw=live).square().sum().backward()
    torch.testing.assert_close(gradient, live.grad)


def test_jvp_of_the_response_pass_at_zero_is_the_linearized_pass() -> None:
    stn = made().eval()
    raw = raw_of(stn)
    centre = stn.hparams.raw.detach().expand(5, -1).contiguous()
    _, derivative = torch.func.jvp(lambda r: stn.respond(X, raw=r), (centre,), (raw - centre,))
    torch.testing.assert_close(derivative, stn.linearize(X, raw=raw)[1])


def test_functional_call() -> None:
    stn = made().eval()
    doubled = {name: 2 * p.detach() for name, p in stn.named_parameters() if name.startswith("model.")}
    expected = torch.func.functional_call(stn.model, {k.removeprefix("model."): v for k, v in doubled.items()}, (X,))
    torch.testing.assert_close(torch.func.functional_call(stn, doubled, (X,)), expected)
    stn.train()
    with torch.no_grad():
        stn.hparams.raw.fill_(-50)
    torch.testing.assert_close(torch.func.functional_call(stn, doubled, (X,)), expected)


# ---- state


def test_state_dict_round_trip() -> None:
    first, second = made(), stn_fx.transform(MLP().double(), "dropout,weight_decay", (X,), seed=9)
    state = first.state_dict()
    assert {f"model.{key}" for key in first.model.state_dict()} <= state.keys()
    assert {key.split(".")[0] for key in state} == {"model", "response", "hparams"}
    second.load_state_dict(state)
    raw = raw_of(first)
    torch.testing.assert_close(first.respond(X, raw=raw), second.respond(X, raw=raw))


def test_inside_another_module_the_keys_have_a_prefix() -> None:
    outer = nn.ModuleDict({"tuned": made()})
    assert all(key.startswith("tuned.") for key in outer.state_dict())
    outer.load_state_dict(outer.state_dict())


def test_a_state_dict_saves_and_loads_without_pickled_code() -> None:
    stn, buffer = made(), io.BytesIO()
    torch.save(stn.state_dict(), buffer)
    buffer.seek(0)
    stn.load_state_dict(torch.load(buffer, weights_only=True))


def test_another_dtype_is_captured_anew() -> None:
    stn = made()
    raw = raw_of(stn)
    expected = stn.respond(X, raw=raw)
    stn.float()
    assert stn.hparams.raw.dtype == torch.float32
    output = stn.respond(X.float(), raw=raw.float())
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda stn: pickle.loads(pickle.dumps(stn))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent_and_go_on_with_the_same_masks(copied: Any) -> None:
    stn = made().train()
    stn(X)
    other = copied(stn)
    raw = raw_of(stn)
    assert torch.equal(other.respond(X, raw=raw), stn.respond(X, raw=raw))
    assert torch.equal(other(X), stn(X)), "the generators go on from where they were"
    with torch.no_grad():
        next(iter(other.base_parameters())).fill_(0)
    assert not torch.equal(other.respond(X), stn.respond(X))


# ---- capture on the way


def test_before_the_first_batch_everything_says_what_to_do() -> None:
    stn = stn_fx.transform(MLP(), "dropout")
    for ask in (lambda: stn.hparams, lambda: stn.response_parameters(), lambda: stn.report, lambda: stn.compiled):
        with pytest.raises(StnError, match="example_inputs"):
            ask()
    assert list(stn.base_parameters())


def test_the_first_batch_captures() -> None:
    stn = stn_fx.transform(MLP().double(), "dropout").train()
    stn(X)
    assert stn.hparams.names == ("dropout.drop",)
    assert list(stn.response_parameters())


def test_a_new_shape_is_captured_anew_and_keeps_the_response() -> None:
    class Convolutional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.g(self.f(x).relu().mean((2, 3)))

    small, large = torch.randn(3, 3, 8, 8), torch.randn(2, 3, 11, 9)
    stn = stn_fx.transform(Convolutional(), "weight_decay", (small,))
    spread(stn)
    parameters = [id(p) for p in stn.parameters()]
    output = stn.respond(large)
    assert output.shape == (2, 2)
    assert [id(p) for p in stn.parameters()] == parameters
    first = stn.compiled
    stn.respond(small)
    stn.respond(large)
    assert stn.compiled is first, "captured graphs are kept"


def test_frozen_parts_are_captured_anew() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    stn = stn_fx.transform(model, "weight_decay", (X,)).train()
    model[1].eval()
    before = model[1].running_mean.clone()
    expected = model(X)
    assert_close([stn(X)], [expected], "base pass with a frozen batch norm")
    assert torch.equal(model[1].running_mean, before)


def test_an_example_batch_of_one() -> None:
    stn = stn_fx.transform(MLP().double(), "dropout,weight_decay", (X[:1],)).eval()
    assert any("one row" in note for note in stn.compiled.plan.notes)
    spread(stn)
    raw = raw_of(stn)
    together = stn.respond(X, raw=raw)
    for i in range(5):
        torch.testing.assert_close(stn.respond(X[i : i + 1], raw=raw[i : i + 1]), together[i : i + 1])


def test_two_wrappers_of_one_model() -> None:
    model = MLP().double()
    first = stn_fx.transform(model, "dropout", (X,), seed=1)
    second = stn_fx.transform(model, "weight_decay", (X,), response=stn_fx.LowRank(2), seed=2)
    spread(first)
    assert torch.equal(first.model.head.weight, second.model.head.weight)
    torch.testing.assert_close(second.eval().respond(X, raw=raw_of(second)), model.eval()(X), rtol=1e-13, atol=1e-14)
    assert not torch.equal(first.respond(X, raw=raw_of(first)), model(X))


def test_inputs_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(8, 2)

        def forward(self, *, image: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"logits": self.f(image) * scale[:, None]}

    model = Named().double()
    stn = stn_fx.transform(model, "weight_decay", {"image": X, "scale": X[:, 0]}).eval()
    output = stn.respond(image=X, scale=X[:, 0])
    assert_close(leaves(output), leaves(model(image=X, scale=X[:, 0])), "keyword inputs")


# ---- what is refused


class NoParameters(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def frozen() -> nn.Module:
    return MLP().double().requires_grad_(False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((lambda x: x, "dropout", (X,)), InputError, "torch.nn.Module"),
        ((NoParameters(), "dropout", (X,)), InputError, "no parameters"),
        ((frozen(), "dropout", (X,)), InputError, "frozen"),
        ((MLP().double(), "", (X,)), InputError, "empty"),
        ((MLP().double(), [], (X,)), InputError, "empty"),
        ((MLP().double(), "droput", (X,)), UnknownHyperparameterError, "dropout"),
        ((MLP().double(), "dropout@nowhere.*", (X,)), UnknownHyperparameterError, "nowhere"),
        ((MLP().double(), "dropout", (torch.tensor(1.0),)), InputError, "batch"),
        ((MLP().double(), "dropout", 3), InputError, "example_inputs"),
        ((MLP().double(), "dropout", (X.float(),)), StnError, "dtype"),
        ((MLP().double(), "cutout", (X,)), StnError, "cutout"),
    ],
)
def test_what_is_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        stn_fx.transform(*arguments)


def test_a_wrapper_is_not_wrapped_again() -> None:
    with pytest.raises(InputError, match="already"):
        stn_fx.transform(made(), "dropout", (X,))


def test_an_unknown_response_is_refused() -> None:
    with pytest.raises(InputError, match="LowRank"):
        stn_fx.transform(MLP(), "dropout", response="dense")


@pytest.mark.parametrize("shape", [(5, 3), (4, 2), (3,), (5, 2, 1)])
def test_a_wrong_raw_shape_is_refused_with_the_right_one(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\(5, 2\)"):
        made().respond(X, raw=torch.zeros(shape, dtype=torch.float64))


def test_an_input_that_requires_grad_is_refused_by_the_linearized_pass() -> None:
    stn = made().eval()
    with pytest.raises(StnError, match="Detach"):
        stn.linearize(X.clone().requires_grad_(), raw=raw_of(stn))


@pytest.mark.parametrize("response", ["rowwise", stn_fx.LowRank(2)])
def test_padding_stays_padding_under_every_hyperparameter(response):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6, padding_idx=2), nn.Linear(6, 4)).double()
    stn = stn_fx.transform(model, "dropout(shared),weight_decay", (torch.randint(0, 9, (4, 5)),), response=response)
    step = Linearized()  # in each of the three steps: a first one leaves V as it was drawn
    steps = DeltaSTN(stn, lambda output, target: (output - target).square().mean((1, 2)), response_step=step)
    tokens = torch.tensor([[0, 1, 2, 3, 8], [2, 2, 1, 0, 8]])
    for _ in range(3):
        steps.inner_step((tokens, torch.randn(2, 5, 4)))
    change = stn.weight_response(torch.ones(2, dtype=torch.float64))["0.weight"]
    assert change[2].eq(0).all()
    assert change[[0, 1, 3, 8]].ne(0).all()
