"""Where the batch lies: decided by evidence for every layout there is, refused where it is not, never guessed."""

import pytest
import torch
import torch.nn.functional as F
from models import MODELS
from oracles import Subject, assert_linearized_pass, assert_response_pass, assert_sites
from rule_cases import Fn, noise, sequence_first
from torch import Tensor, nn
from torch.fx.node import map_arg

import stn_fx
from stn_fx.compiler.capture import capture
from stn_fx.compiler.layouts import run_node
from stn_fx.compiler.thinned import run_thinned, weight_of
from stn_fx.errors import BatchLayoutError, StnError
from stn_fx.rules.layout import BatchLayout, align, join_batch, pack, scale_rows, split_batch, unpack

LAYOUTS = [
    BatchLayout(0),
    BatchLayout(1),
    BatchLayout(2),
    BatchLayout(0, 1, 4),
    BatchLayout(0, 4, 1),
    BatchLayout(1, 2, 3),
]


def layouts(stn, operator: str) -> list[BatchLayout]:
    analysed = stn.compiled.analysed["evaluation"]
    nodes = [node for node in analysed.captured.graph.nodes if operator in str(node.target)]
    return [analysed.layouts.get(node) for node in nodes]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packing_is_a_bijection(layout: BatchLayout) -> None:
    shape = [5, 6, 7]
    shape[layout.axis] = 3 * layout.outer * layout.inner
    packed = torch.randn(shape)
    stack = unpack(packed, layout)
    assert stack.shape[0] == 3
    assert torch.equal(pack(stack, layout), packed)
    assert torch.equal(join_batch(split_batch(packed, layout), layout), packed)
    one = [layout.outer * layout.inner if a == layout.axis else n for a, n in enumerate(shape)]
    assert list(stack.shape[1:]) == one, "the unit is what the tensor would be at B = 1"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_values_per_example_reach_their_example(layout: BatchLayout) -> None:
    shape = [5, 6, 7]
    shape[layout.axis] = 3 * layout.outer * layout.inner
    packed, per_example = torch.randn(shape), torch.randn(3)
    expected = pack(unpack(packed, layout) * per_example.reshape(3, 1, 1, 1), layout)
    torch.testing.assert_close(packed * align(per_example, layout, 3), expected)
    if layout.axis != 2:
        rows = per_example.reshape(3, 1).expand(3, shape[2])
        torch.testing.assert_close(scale_rows(packed, rows, layout, -1), expected)


def test_axis_0() -> None:
    stn = stn_fx.transform(nn.Linear(4, 3).double(), "weight_decay", noise(5, 4)(3))
    assert layouts(stn, "linear") == [BatchLayout(0)]


def test_axis_1_is_found_where_only_it_keeps_examples_apart() -> None:
    """Attention over axis 0 mixes its rows, so the batch must be axis 1."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.f(x)
        weights = torch.einsum("tbe,sbe->bts", y, y).softmax(-1)
        return m.g(torch.einsum("bts,sbe->tbe", weights, y))

    subject = Subject(lambda: Fn(forward, f=nn.Linear(4, 4), g=nn.Linear(4, 2)), sequence_first(6, 4), batch_axis=1)
    assert subject.stn.compiled.captured.batch_axes == [1]
    assert any("batch axis 1" in note for note in subject.stn.compiled.plan.notes)
    for batch in (2, 6):  # 6 is T == B
        assert_response_pass(subject, batch)
        assert_linearized_pass(subject, batch)


def test_windows_are_batch_major() -> None:
    stn = stn_fx.transform(MODELS["swin_t"].build().double(), "weight_decay", MODELS["swin_t"].inputs(3))
    folded = [layout for layout in layouts(stn, "linear") if layout is not None and layout.folded]
    assert folded, "windows fold the batch into axis 0"
    assert all(layout.outer == 1 for layout in folded)


def test_the_output_projection_of_attention_is_batch_minor() -> None:
    def build() -> nn.Module:
        return Fn(lambda m, x: m.a(x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(8, 2, batch_first=True))

    stn = stn_fx.transform(build().double(), "weight_decay", noise(5, 8)(3))
    assert BatchLayout(0, 5, 1) in layouts(stn, "linear")


@pytest.mark.parametrize("operator", ["batch-major", "batch-minor"])
def test_sites_on_folded_axes(operator: str) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.f(x)
        y = y.flatten(0, 1) if operator == "batch-major" else y.transpose(0, 1).flatten(0, 1)
        y = m.drop(y).tanh()
        if operator == "batch-major":
            return m.g(y).reshape(-1, 4, 2)
        return m.g(y).reshape(4, -1, 2).transpose(0, 1)

    def build() -> nn.Module:
        return Fn(forward, f=nn.Linear(5, 6), g=nn.Linear(6, 2), drop=nn.Dropout(0.3))

    subject = Subject(build, noise(4, 5), "dropout,weight_decay")
    for batch in (2, 4):  # 4 is T == B
        assert_sites(subject, batch)
        assert_response_pass(subject, batch)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_named_axis_decides_where_both_would_do(axis: int) -> None:
    inputs = noise(4, 5) if axis == 0 else sequence_first(4, 5)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.3), nn.Linear(6, 2))

    subject = Subject(build, inputs, "dropout,weight_decay", batch_axis=axis, name_axis=True)
    assert_response_pass(subject, 4)
    assert_sites(subject, 4)


def test_a_model_that_mixes_examples_is_refused() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.f(x)
            return F.softmax(y @ y.transpose(0, 1), -1) @ y

    with pytest.raises(StnError, match="batch_axis"):
        stn_fx.transform(Mixing(), "weight_decay", (torch.randn(3, 4),))


def test_a_named_axis_that_mixes_examples_is_refused() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(BatchLayoutError, match=r"not independent.*\(they meet in aten\."):
        stn_fx.transform(model, "dropout", (torch.randn(3, 5, 8),), batch_axis=1)


def test_statistics_over_the_batch_are_not_conditioned_but_told() -> None:
    """The mean over the batch belongs to no example: what is built on it stays shared, and the plan says so."""

    def build() -> nn.Module:
        return Fn(lambda m, x: m.f(x) + m.g(x.mean(0, keepdim=True)), f=nn.Linear(4, 3), g=nn.Linear(4, 3))

    with pytest.raises(BatchLayoutError):
        stn_fx.transform(build(), "weight_decay", (torch.randn(3, 4),))


LAYERS = {
    "linear": (nn.Linear(12, 5), (3, 4, 12)),
    "linear without bias, few features": (nn.Linear(2, 5, bias=False), (3, 2)),
    "convolution": (nn.Conv2d(8, 6, 3, stride=2, padding=1), (3, 8, 9, 9)),
    "grouped and dilated": (nn.Conv2d(12, 6, 3, groups=2, dilation=2), (3, 12, 9, 9)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (3, 4, 5, 5)),
    "same padding": (nn.Conv1d(7, 6, 3, padding="same"), (3, 7, 9)),
    "in three dimensions": (nn.Conv3d(5, 6, (1, 3, 3)), (3, 5, 4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1), (3, 8, 4, 4)),
    "transposed in groups": (nn.ConvTranspose1d(8, 6, 3, groups=2, dilation=2), (3, 8, 6)),
    "matmul": (Fn(lambda m, x: torch.matmul(x, m.f.weight), f=nn.Linear(5, 12)), (3, 4, 12)),
    "addmm": (Fn(lambda m, x: torch.addmm(m.f.bias, x, m.f.weight.t()), f=nn.Linear(12, 5)), (3, 12)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_thinned_layer_turns_nan_where_the_layer_does(name: str) -> None:
    layer, shape = LAYERS[name]
    graph = capture(layer, (torch.randn(shape),), {}, [0]).evaluation
    node = next(n for n in graph.graph.nodes if weight_of(n, ()) is not None)
    x = torch.randn(shape)
    x[1, ..., -1].view(-1)[-1] = float("nan")
    x[2].view(-1)[0] = float("nan")
    state = dict(layer.state_dict())
    env = {n: state[graph.state[n.name]] for n in graph.placeholders().values() if n.name in graph.state}
    env[graph.placeholders()[graph.inputs[0]]] = x
    for each in graph.graph.nodes:  # what leads from a parameter to the weight
        if each is node:
            break
        if each.op == "call_function":
            env[each] = run_node(each, env)
    arguments = map_arg(node.args, lambda n: env[n])
    full, thin = node.target(*arguments), run_thinned(node, arguments, torch.Generator())
    assert thin.shape == full.shape
    assert torch.equal(thin.isnan(), full.isnan())
    assert full[0].isfinite().all()


def test_a_weight_that_depends_on_examples_is_not_thinned() -> None:
    model = Fn(lambda m, x: F.linear(m.f(x), m.g(x)), f=nn.Linear(6, 6), g=nn.Linear(6, 6))
    graph = capture(model, (torch.randn(3, 6),), {}, [0]).evaluation
    *layers, product = [n for n in graph.graph.nodes if "linear" in str(n.target)]
    batched = {n for n in graph.graph.nodes if n.name in graph.inputs or n in layers}
    assert [weight_of(n, batched) is not None for n in (*layers, product)] == [True, True, False]
    with pytest.raises(BatchLayoutError):
        stn_fx.transform(model, "weight_decay", (torch.randn(3, 6),))
