"""Capture: two functional graphs of an unmodified module, which is as before; clear errors where it fails."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from oracles import conditioned_share, unconditioned
from rule_cases import Fn
from torch import Tensor, nn

import stn_fx
from stn_fx.compiler.capture import capture
from stn_fx.compiler.functionalize import written_argument
from stn_fx.errors import CaptureError, InputError


def captured(model: nn.Module, *inputs: Tensor) -> Any:
    return capture(model, inputs, {}, [0 for _ in inputs])


def targets(graph: Any) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def test_placeholders_know_their_qualified_names() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    graphs = captured(model, torch.randn(3, 4))
    assert set(graphs.training.state.values()) == set(model.state_dict())
    assert len(graphs.training.inputs) == 1
    assert graphs.training.training
    assert not graphs.evaluation.training


def test_the_batch_is_dynamic() -> None:
    graph = captured(nn.Linear(4, 3), torch.randn(3, 4)).evaluation
    output = next(node for node in graph.graph.nodes if node.op == "output").args[0][0]
    assert graph.batch_symbol in output.meta["val"].shape[0].node.expr.free_symbols


def test_nothing_in_a_graph_writes_in_place() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.f(x)
        y[:, 0] += 1
        y[:, 1] = x[:, 1]
        return y.relu_().mul_(2)

    graph = captured(Fn(forward, f=nn.Linear(4, 3)), torch.randn(3, 4)).training
    assert all(written_argument(node) is None for node in graph.graph.nodes)


def test_updates_of_buffers_are_explicit() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.seen += 1
            return self.f(x)

    model = Counting()
    graphs = captured(model, torch.randn(3, 4))
    assert list(graphs.training.buffer_updates) == ["seen"]
    assert not graphs.evaluation.buffer_updates
    stn = stn_fx.transform(model, "weight_decay", (torch.randn(3, 4),)).train()
    stn(torch.randn(5, 4))
    stn.linearize(torch.randn(5, 4))
    assert model.seen == 1, "the base pass alone updates buffers"
    assert not model.seen.requires_grad


def test_regions_are_inlined_and_gradients_stop_at_no_grad() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = m.g(x).sigmoid()
        return m.f(x) * gate

    graph = captured(Fn(forward, f=nn.Linear(4, 3), g=nn.Linear(4, 3)), torch.randn(3, 4)).training
    assert "aten.detach.default" in targets(graph)
    assert not any("wrap" in target for target in targets(graph))


def test_recurrent_cells_become_layers_and_gates() -> None:
    model = Fn(lambda m, x: m.cell(x)[0], cell=nn.LSTMCell(4, 3))
    graph = captured(model, torch.randn(3, 4)).evaluation
    assert targets(graph).count("aten.linear.default") == 2
    assert not any("lstm_cell" in target for target in targets(graph))


def test_a_batch_of_one_is_repeated_and_said() -> None:
    graphs = captured(nn.Linear(4, 3), torch.randn(1, 4))
    assert graphs.example[0].shape == (2, 4)
    assert "one row" in graphs.notes[0]


@pytest.mark.parametrize("failing", [False, True])
def test_the_module_is_as_it_was(failing: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.path, self.norm, self.f = (
                torchvision.ops.StochasticDepth(0.2, "row"),
                nn.BatchNorm1d(4),
                nn.Linear(4, 4),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x + self.path(self.f(x)))
            return x.nonzero() if failing and x.sum().item() > 0 else x

    model = Model().train()
    model.norm.eval()
    hook = model.f.register_forward_hook(lambda *_: None)
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    state, generator = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    if failing:
        with pytest.raises(CaptureError):
            captured(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    else:
        captured(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert hook.id in model.f._forward_hooks
    assert torch.backends.mha.get_fastpath_enabled() is False  # as the fixture has it


def test_a_forward_that_looks_at_values_is_told_where_and_what_to_do() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x) if x.sum() > 0 else -self.f(x)

    with pytest.raises(CaptureError, match=r"(?s)Branching.*Remedy"):
        captured(Branching(), torch.randn(3, 4))


def test_of_a_large_batch_two_examples_are_run() -> None:
    rows = []
    model = Fn(lambda m, x: (rows.append(x.shape[0]), m.f(x))[1], f=nn.Linear(4, 3))
    captured(model, torch.randn(64, 4))
    assert [n for n in rows if isinstance(n, int)] == [2]


def test_inputs_that_do_not_fit_are_told() -> None:
    with pytest.raises(CaptureError, match="does not run on the example inputs"):
        captured(nn.Linear(4, 3), torch.randn(3, 5))


def test_inputs_that_disagree_on_the_batch_are_refused() -> None:
    model = Fn(lambda m, x, y: m.f(x) + y.sum(), f=nn.Linear(4, 3))
    with pytest.raises(InputError, match="disagree"):
        captured(model, torch.randn(3, 4), torch.randn(2, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [
        lambda: torchvision.models.convnext_tiny(num_classes=10),
        lambda: torchvision.models.swin_t(num_classes=10),
        lambda: torchvision.models.swin_v2_t(num_classes=10),
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10),
    ],
    ids=["convnext_tiny", "swin_t", "swin_v2_t", "timm vit_tiny"],
)
def test_full_models_are_conditioned(build: Any) -> None:
    stn = stn_fx.transform(build(), None, (torch.randn(2, 3, 32, 32),))
    assert conditioned_share(stn) >= 0.95, list(unconditioned(stn))
