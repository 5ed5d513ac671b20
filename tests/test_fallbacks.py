"""What cannot go the usual way: opaque leaves and operators without a forward mode; each is in the report."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    Subject,
    assert_base_gradients,
    assert_close,
    assert_gradients,
    assert_response_pass,
    assert_sites,
    assert_training_graph,
    assert_unchanged,
    leaves,
    rates_off,
    spread,
)
from rule_cases import Fn, noise
from torch import Tensor, nn

import stn_fx
from stn_fx.errors import BatchLayoutError, CaptureError, StnError

SITES = "dropout(shared),weight_decay"


class Gate(nn.Module):
    """Branches on the values of what it is given; a batch takes one branch as a whole."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.positive, self.negative = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.positive(x).tanh() if x.sum() > -1e9 else self.negative(x)


class RandomGate(Gate):
    """Draws of its own, which the tangent must repeat."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.3, self.training)


class NormGate(Gate):
    """Statistics of its own, which only the base pass may move."""

    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Mapped(Gate):
    """A torch.func transform inside of a forward, which traces but does not make a plain graph."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.positive)(x) + self.negative(x)


class Swish(torch.autograd.Function):
    """A Function of the user's own with the right backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        gate = x.sigmoid()
        return gradient * gate * (1 + x * (1 - gate))


class StraightThrough(torch.autograd.Function):
    """One with a backward that is not the derivative of its forward."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Applied(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def around(middle: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A model that can be captured around its middle."""
    return lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), middle(), nn.Dropout(0.2), nn.Linear(6, 3))


def numeric_tangent(subject: Subject, batch: int) -> None:
    """The linearized pass against central differences of the response pass."""
    inputs, delta_BH, stn = subject.inputs(batch), subject.displacement(batch), subject.stn
    stn.eval()
    _, tangent = stn.linearize(*inputs, raw=subject.raw(delta_BH))
    ahead, behind = (stn.respond(*inputs, raw=subject.raw(s * 1e-5 * delta_BH)) for s in (1, -1))
    differences = [(a - b) / 2e-5 for a, b in zip(leaves(ahead), leaves(behind), strict=True)]
    assert_close(leaves(tangent), differences, "tangent against central differences", 1e-7)


# ---- opaque leaves


@pytest.mark.parametrize("response", ["rowwise", stn_fx.LowRank(2)], ids=["row-wise", "low-rank"])
@pytest.mark.parametrize(
    "middle",
    [Gate, RandomGate, NormGate, Mapped, lambda: Applied(Swish)],
    ids=["branch", "random", "norm", "vmap", "Function"],
)
def test_a_module_that_cannot_be_captured_runs_as_itself(middle: Callable[[], nn.Module], response: str) -> None:
    subject = Subject(around(middle), noise(5), SITES, response)
    stn = subject.stn
    plans = {plan.name: plan for plan in stn.compiled.plan.parameters}
    assert {name.split(".")[0] for name, plan in plans.items() if plan.conditioned} == {"0", "4"}
    assert all("2 cannot be captured" in plan.reason for name, plan in plans.items() if name.startswith("2."))
    assert any("2 runs as itself" in note for note in stn.report.notes)
    for batch in (1, 2, 5):
        assert_response_pass(subject, batch)
        numeric_tangent(subject, batch)
    assert_gradients(subject, 2)
    if middle is not RandomGate:
        assert_unchanged(subject, 4)
        assert_base_gradients(subject, 4)
        assert_sites(subject, 4) if middle is not NormGate else None


def test_its_parameters_are_trained_by_the_base_pass_alone() -> None:
    stn = Subject(around(Gate), noise(5), SITES).stn.train()
    (x,) = noise(5)(4)
    primal, tangent = stn.linearize(x)
    (primal + tangent).sum().backward()
    assert all(p.grad is None for p in stn.model.parameters())
    stn(x).sum().backward()
    assert stn.model[2].positive.weight.grad.any()


def test_its_statistics_and_the_modes_are_left_alone() -> None:
    subject = Subject(around(NormGate), noise(5), SITES)
    assert_training_graph(subject, 5)
    stn = subject.stn.train()
    (x,) = noise(5)(4)
    before = {name: buffer.clone() for name, buffer in stn.model.named_buffers()}
    stn.linearize(x)
    stn.respond(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in stn.model.named_buffers())
    assert all(module.training for module in stn.model.modules())
    stn(x)
    assert stn.model[2].norm.num_batches_tracked == 1


def test_the_tangent_repeats_the_draws_in_its_backward() -> None:
    """Linear in the response parameters: doubling V doubles the tangent, and its gradient is that of finite steps."""
    stn = Subject(around(RandomGate), noise(5), SITES).stn.train()
    (x,) = noise(5)(4)
    raw = stn.hparams.raw.detach() + torch.randn(4, 2, dtype=torch.float64)
    parameter = dict(stn.response.named_parameters())["0/weight.V"]

    def tangent() -> Tensor:
        torch.manual_seed(3)
        stn.generator().manual_seed(3)
        return stn.linearize(x, raw=raw)[1].square().sum()

    (gradient,) = torch.autograd.grad(tangent(), parameter)
    direction = torch.randn(parameter.shape, dtype=torch.float64)
    with torch.no_grad():
        parameter.add_(1e-6 * direction)
        ahead = tangent()
        parameter.add_(-2e-6 * direction)
        behind = tangent()
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-9)


class Whitening(Gate):
    """Refuses NaN, as decompositions do; ``across`` mixes the examples."""

    def __init__(self, across: bool = False) -> None:
        super().__init__()
        self.across = across

    def forward(self, x: Tensor) -> Tensor:
        if not bool(x.isfinite().all()):
            raise torch.linalg.LinAlgError("not finite")
        x = self.positive(x)
        return x - x.mean(0) if self.across else x


def test_a_leaf_that_refuses_what_the_probe_gives_it_is_tried_with_other_examples() -> None:
    subject = Subject(around(Whitening), noise(5), SITES)
    assert {n.split(".")[0] for n in subject.stn.report.unconditioned} == {"2"}
    assert_response_pass(subject, 2)
    numeric_tangent(subject, 2)
    with pytest.raises(BatchLayoutError, match=r"\(they meet in .* at 2\)"):
        stn_fx.transform(around(lambda: Whitening(across=True))().double(), SITES, noise(5)(3))


class Caching(Gate):
    """Keeps what it computed last, and shares a weight among its own modules."""

    def __init__(self) -> None:
        super().__init__()
        self.negative.weight = self.positive.weight
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


def test_what_a_leaf_caches_is_no_tensor_of_the_linearized_pass() -> None:
    stn = Subject(around(Caching), noise(5), SITES).stn.train()
    weight, (x,) = stn.model[2].positive.weight, noise(5)(4)
    stn(x)
    last = stn.model[2].last
    stn.linearize(x)
    assert stn.model[2].last is last
    assert stn.model[2].positive.weight is stn.model[2].negative.weight is weight
    copy.deepcopy(stn.model[2].positive)


def test_hooks_run_once_and_copies_work() -> None:
    model = around(Gate)().double()
    calls = []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    stn = stn_fx.transform(model, SITES, noise(5)(3)).train()
    assert "_call_impl" not in vars(model[2])
    calls.clear()
    stn(*noise(5)(4))
    assert len(calls) == 1
    model[2]._forward_hooks.clear()
    spread(stn)
    for copied in (copy.deepcopy(stn), pickle.loads(pickle.dumps(stn))):
        assert_close([copied.respond(*noise(5)(4))], [stn.respond(*noise(5)(4))], "a copy")
        with torch.no_grad():
            copied.model[2].positive.weight.zero_()
        assert stn.model[2].positive.weight.any()


def test_a_tied_weight_does_not_respond_outside_of_the_leaf_either() -> None:
    def build() -> nn.Module:
        model = around(Gate)()
        model[2].positive.weight = model[2].negative.weight
        model.append(nn.Linear(3, 6))
        model.append(nn.Linear(6, 6))
        model[6].weight = model[2].positive.weight
        return model

    subject = Subject(build, noise(5), SITES)
    assert not subject.stn.compiled.plan.parameter("2.positive.weight").conditioned
    assert_response_pass(subject, 2)
    numeric_tangent(subject, 2)


def test_a_backward_that_is_no_derivative_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"(?s)2 cannot be captured.*not the derivative of its forward.*Remedy"):
        stn_fx.transform(around(lambda: Applied(StraightThrough))().double(), SITES, noise(5)(3))


def test_a_branch_in_the_model_itself_is_an_error_that_names_the_line() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x) if x.sum() > 0 else -self.f(x)

    with pytest.raises(CaptureError, match=r"(?s)Branching.*test_fallbacks.py:\d+: return self.f\(x\) if.*Remedy"):
        stn_fx.transform(Branching(), SITES, (torch.randn(4, 5),))


def test_nothing_left_to_condition_is_an_error() -> None:
    with pytest.raises(CaptureError, match="No parameter of Sequential can respond"):
        stn_fx.transform(nn.Sequential(Gate(5), nn.Dropout(0.1)).double(), SITES, noise(5)(3))


def test_an_opaque_leaf_is_not_written_down_as_code(tmp_path) -> None:
    from stn_fx.compiler.emit import emit

    stn = stn_fx.transform(around(Gate)().double(), SITES, noise(5)(3))
    with pytest.raises(StnError, match="2 cannot be captured"):
        emit(stn.compiled, stn, tmp_path / "code.py")


def test_under_autocast_it_runs_as_the_users_own() -> None:
    x = noise(5)(4)[0].float()
    stn = stn_fx.transform(around(NormGate)(), SITES, (x,))
    spread(stn)
    raw = stn.hparams.raw.detach() + torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    full = stn.eval().linearize(x, raw=raw)[1]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(stn.respond(x), stn.model(x), rtol=2e-2, atol=1e-2)
        tangent = stn.linearize(x, raw=raw)[1]
    assert tangent.dtype == torch.bfloat16
    torch.testing.assert_close(tangent.float(), full, rtol=5e-2, atol=2e-2)


# ---- places where the batch is undecided


def test_a_parameter_where_the_batch_is_undecided_does_not_respond_and_is_named() -> None:
    model = Fn(lambda m, x: (m.f(x), m.g(x.mean(0, keepdim=True))), f=nn.Linear(5, 4), g=nn.Linear(5, 2)).double()
    stn = stn_fx.transform(model, "weight_decay", noise(5)(3))
    spread(stn)
    assert set(stn.report.unconditioned) == {"g.weight", "g.bias"}
    assert all("undecided" in reason and " g" in reason for reason in stn.report.unconditioned.values())
    (x,) = noise(5)(4)
    raw = stn.hparams.raw.detach() + torch.randn(4, 1, dtype=torch.float64)
    ours, theirs = stn.eval().respond(x, raw=raw), model.eval()(x)
    torch.testing.assert_close(ours[1], theirs[1])
    assert not torch.equal(ours[0], theirs[0])


# ---- operators without a forward mode


@torch.library.custom_op("stn_fx_tests::sine", mutates_args=())
def sine(x: Tensor) -> Tensor:
    return x.sin()


sine.register_fake(torch.empty_like)
sine.register_autograd(
    lambda ctx, gradient: gradient * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        ("_cdist_forward|cdist", lambda m, x: m.g(torch.cdist(m.f(x), m.f(x).sin()).flatten(1))),
        ("stn_fx_tests.sine", lambda m, x: m.g(sine(m.f(x)).flatten(1)[:, :9])),
    ],
    ids=["cdist", "custom operator"],
)
def test_an_operator_without_forward_mode_goes_by_differences(name: str, forward: Callable[..., Tensor]) -> None:
    build = lambda: Fn(forward, f=nn.Linear(5, 4), g=nn.Linear(9, 3))  # noqa: E731
    subject = Subject(build, noise(3, 5), "weight_decay,label_smoothing")
    (note,) = [note for note in subject.stn.report.notes if "central differences" in note]
    assert any(part in note for part in name.split("|"))
    for batch in (1, 2, 5):
        assert_unchanged(subject, batch)
        assert_response_pass(subject, batch)
        numeric_tangent(subject, batch)
    assert_gradients(subject, 2)
    assert_base_gradients(subject, 2)


def test_a_parameter_that_enters_one_does_not_respond() -> None:
    model = Fn(lambda m, x: m.f(x) * sine(m.scale), f=nn.Linear(5, 4), scale=torch.rand(4)).double()
    stn = stn_fx.transform(model, "weight_decay", noise(5)(3))
    plan = stn.compiled.plan.parameter("scale")
    assert not plan.conditioned
    assert "sine" in plan.reason
    with rates_off(stn):
        assert_close([stn.eval().respond(*noise(5)(2))], [model(*noise(5)(2))], "without displacement")
