"""Precision and device: float32, float64, bfloat16 under autocast; a moved model keeps response and optimizer."""

import copy
from typing import Any

import pytest
import torch
from oracles import relative_error, spread
from torch import Tensor, nn

import stn_fx

X = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
DEVICES = ["cpu", CUDA]


class Net(nn.Module):
    """A bit of everything that autocast treats differently; `regions` opens and closes it inside of the forward."""

    def __init__(self, regions: str = "") -> None:
        super().__init__()
        self.regions = regions
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.layer, self.scale, self.drop = nn.Linear(36, 6), nn.Parameter(torch.rand(6)), nn.Dropout(0.2)
        self.mix, self.attend = nn.LayerNorm(6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        with torch.autocast(device, torch.bfloat16, enabled="low" in self.regions or torch.is_autocast_enabled(device)):
            x = self.conv(x)
            with torch.autocast(
                device, torch.bfloat16, enabled="high" not in self.regions and x.dtype != torch.float32
            ):
                x = self.norm(x.float() if "high" in self.regions else x).relu()
            x = self.drop(self.mix(self.layer(x.flatten(1)))) * self.scale
            x = x[:, None]
            x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.head(x[:, 0].to(self.head.weight.dtype))


def made(response: Any = "rowwise", device: str = "cpu", dtype: torch.dtype = torch.float32, regions: str = "") -> Any:
    torch.manual_seed(0)
    model = Net(regions).to(device, dtype)
    stn = stn_fx.transform(model, "dropout(shared),weight_decay", (X.to(device, dtype),), response=response, seed=0)
    spread(stn)
    return stn


def raw_of(stn: Any) -> Tensor:
    noise = torch.randn(len(X), len(stn.hparams), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return stn.hparams.raw.detach() + 0.3 * noise.to(stn.hparams.raw)


def passes(stn: Any) -> list[Tensor]:
    """Response pass and linearized pass on the evaluation graph."""
    x, raw = X.to(stn.hparams.raw), raw_of(stn)
    stn.eval()
    return [stn.respond(x, raw=raw), *stn.linearize(x, raw=raw)]


def gradients(stn: Any) -> list[Tensor]:
    """Of the response parameters by the linearized pass, and of the raw hyperparameters by the response pass."""
    x, raw = X.to(stn.hparams.raw), raw_of(stn)
    primal, tangent = stn.eval().linearize(x, raw=raw)
    loss = (primal + tangent).float().square().sum()
    found = torch.autograd.grad(loss, list(stn.response_parameters()))
    return [*found, *torch.autograd.grad(stn.respond(x).float().square().sum(), [stn.hparams.raw])]


RESPONSES = pytest.mark.parametrize("response", ["rowwise", stn_fx.LowRank(2)], ids=["row-wise", "low-rank"])


@RESPONSES
@pytest.mark.parametrize("device", DEVICES)
def test_float32_agrees_with_float64(response: Any, device: str) -> None:
    exact, single = made(response, device, torch.float64), made(response, device)
    for half in (exact, single):
        assert {p.dtype for p in half.parameters()} == {half.hparams.raw.dtype}
    single.load_state_dict(exact.state_dict())
    for ours, theirs in zip(passes(single) + gradients(single), passes(exact) + gradients(exact), strict=True):
        assert ours.dtype == torch.float32
        assert relative_error([ours.double()], [theirs]) < 1e-4


@RESPONSES
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("regions", ["", "high"], ids=["around the call", "with a region of full precision"])
def test_autocast_around_the_call(response: Any, device: str, regions: str) -> None:
    stn = made(response, device, regions=regions)
    x = X.to(stn.hparams.raw)
    expected, expected_gradients = passes(stn), gradients(stn)
    with torch.autocast(device, torch.bfloat16):
        model = stn.model.eval()(x)
        found, plain = passes(stn), stn.respond(x)
        found_gradients = gradients(stn)
    assert relative_error([plain.float()], [model.float()]) < 2e-2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert relative_error([ours.float()], [theirs]) < 3e-2
    for ours, theirs in zip(found_gradients, expected_gradients, strict=True):
        assert ours.dtype == torch.float32
        assert relative_error([ours], [theirs]) < 0.1
    assert passes(stn)[0].dtype == torch.float32, "outside of autocast the other capture serves"
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(passes(stn), expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("regions", "ambient"), [("", True), ("low", False), ("low, high", False), ("high", True)])
def test_the_base_pass_is_the_users_under_autocast(device: str, regions: str, ambient: bool) -> None:
    stn = made(device=device, regions=regions)
    x, judge = X.float().to(device), copy.deepcopy(stn.model).train()
    judge.drop.p = 0.0
    with torch.no_grad():
        stn.hparams.raw.fill_(-50)
    with torch.autocast(device, torch.bfloat16, enabled=ambient):
        ours, theirs = stn.train()(x), judge(x)
    assert ours.dtype == theirs.dtype
    assert relative_error([ours.float()], [theirs.float()]) < 1e-2
    ours.float().square().sum().backward()
    theirs.float().square().sum().backward()
    for (name, p), q in zip(stn.model.named_parameters(), judge.parameters(), strict=True):
        if name != "attend.in_proj_bias":  # its key part is zero but for rounding
            assert relative_error([p.grad], [q.grad]) < 5e-2, name


def test_a_region_of_full_precision_stays_one() -> None:
    """Dtypes in the graph, since rounding alone could not tell."""
    stn = made(regions="low, high")
    nodes = {node.target: node for node in stn.compiled.captured.training.graph.nodes if node.op == "call_function"}
    assert nodes[torch.ops.aten.batch_norm.default].meta["val"].dtype == torch.float32
    assert nodes[torch.ops.aten.conv2d.default].meta["val"].dtype == torch.bfloat16
    assert nodes[torch.ops.aten.conv2d.default].args[0].target is torch.ops.aten.to.dtype


# ---- moved models


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float64), ("cpu", torch.bfloat16), pytest.param(*CUDA.values, None, marks=CUDA.marks)],
)
def test_a_moved_model_keeps_its_response_and_the_optimizers_state(device: str, dtype: torch.dtype | None) -> None:
    stn = made()
    parameters = [*stn.parameters()]
    optimizer = torch.optim.Adam(stn.response_parameters(), 1e-3)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        primal, tangent = stn.train().linearize(x, raw=raw_of(stn))
        (primal + tangent).float().square().sum().backward()
        optimizer.step()

    step(X.float())
    before = [p.detach().clone() for p in stn.response_parameters()]
    momentum = [state["exp_avg"].clone() for state in optimizer.state.values()]
    stn.to(device=device, dtype=dtype)
    assert all(new is old for new, old in zip(stn.parameters(), parameters, strict=True))
    for now, then in zip(stn.response_parameters(), before, strict=True):
        torch.testing.assert_close(now.float().cpu(), then, rtol=1e-2, atol=1e-3)
    optimizer.load_state_dict(optimizer.state_dict())  # torch's own way to move an optimizer's state
    assert [state["exp_avg"].shape for state in optimizer.state.values()] == [m.shape for m in momentum]
    step(X.to(device, dtype or torch.float32))
    assert all(state["step"] == 2 for state in optimizer.state.values())
    assert all(new is old for new, old in zip(stn.parameters(), parameters, strict=True))


def test_there_and_back_is_the_first_capture_again() -> None:
    stn = made(dtype=torch.float64)
    first, output = stn.compiled, passes(stn)
    stn.float()
    passes(stn)
    assert stn.compiled is not first
    stn.double()
    passes(stn)
    assert stn.compiled is first
    torch.testing.assert_close(passes(stn), output, rtol=1e-5, atol=1e-6)


def test_copies_in_another_precision_do_not_disturb_the_original() -> None:
    stn = made()
    expected = passes(stn)
    other = copy.deepcopy(stn).double()
    assert passes(other)[0].dtype == torch.float64
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(passes(stn), expected, strict=True))
    other.load_state_dict(stn.state_dict())
    assert relative_error([passes(other)[0].float()], [expected[0]]) < 1e-5


def test_two_wrappers_of_one_model_in_training_do_not_disturb_each_other() -> None:
    model = Net()
    first = stn_fx.transform(model, "dropout(shared)", (X.float(),), seed=1)
    second = stn_fx.transform(model, "weight_decay,dropout(shared)", (X.float(),), response=stn_fx.LowRank(2), seed=2)
    spread(first)
    spread(second)
    kept = [p.detach().clone() for p in (*second.response_parameters(), *second.hparams.parameters())]
    primal, tangent = first.train().linearize(X.float(), raw=first.hparams.raw.detach() + torch.ones(len(X), 1))
    (primal + tangent).sum().backward()
    assert all(p.grad is None for p in second.response_parameters())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        for p in first.response_parameters():
            p.add_(1.0)
    now = (*second.response_parameters(), *second.hparams.parameters())
    assert all(torch.equal(p, value) for p, value in zip(now, kept, strict=True))
    with torch.no_grad():
        model.head.bias.add_(1.0)
    for stn in (first, second):
        torch.testing.assert_close(stn.eval().respond(X.float()), model.eval()(X.float()))


class FullPrecisionRegion(nn.Module):
    """Divides in a region that switches autocast off, as linear attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(self.inner(x), (0, 1), mode="constant", value=1.0)
        with torch.autocast("cpu", enabled=False):
            x = x.float() / (x[..., -1:] + 1e-3)
        return self.head(x.to(self.head.weight.dtype))


def test_a_region_without_autocast_leaves_the_batch_size_open() -> None:
    """Trying operators on the captured values once fixed the symbolic batch size of the whole graph."""
    x = torch.randn(2, 6, dtype=torch.float64)
    stn = stn_fx.transform(FullPrecisionRegion().double(), "weight_decay", (x,))
    for captured in (stn.compiled.captured.training, stn.compiled.captured.evaluation):
        given = captured.placeholders()[captured.inputs[0]].meta["val"]
        assert isinstance(given.shape[0], torch.SymInt)
    assert stn_fx.check(stn, torch.randn(5, 6, dtype=torch.float64)).passed
