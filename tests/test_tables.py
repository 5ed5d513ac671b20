"""Large tables that are added or multiplied respond row-wise; small ones keep the exact Jacobian."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import EVERY_ORACLE, Subject, unconditioned
from rule_cases import Fn, noise, sequence_first
from torch import Tensor, nn

import stn_fx


def resized(m: nn.Module, x: Tensor) -> Tensor:
    """As timm resamples position embeddings: to another grid, channels first."""
    grid = m.table.reshape(1, 3, 3, 6).permute(0, 3, 1, 2)
    return m.f(x + F.interpolate(grid, (2, 4), mode="bilinear").permute(0, 2, 3, 1).reshape(1, 8, 6))


def windows(m: nn.Module, x: Tensor) -> Tensor:
    """As Swin's windows: the batch shares its axis with what the table does not know."""
    cut = x.reshape(x.shape[0] * 2, 4, 6) + m.table
    return m.f(cut.reshape(x.shape[0], 8, 6))


def several_matrices(m: nn.Module, x: Tensor) -> Tensor:
    return m.f(torch.matmul(x.unsqueeze(1), m.table).sum(1))


def relative_positions() -> nn.Module:
    """As Swin's bias: rows gathered by a fixed index, features (heads) before the two positions."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        heads = x.reshape(-1, 4, 2, 3).transpose(1, 2)
        bias = m.table[m.places.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        mixed = (heads @ heads.transpose(-1, -2) + bias).softmax(-1) @ heads
        return m.f(mixed.transpose(1, 2).reshape(-1, 4, 6))

    model = Fn(forward, table=torch.rand(7, 2))
    model.register_buffer("places", torch.arange(4)[:, None] - torch.arange(4) + 3)
    return model


TABLES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], int]] = {
    "added": (lambda: Fn(lambda m, x: m.f(x + m.table), table=torch.rand(1, 8, 6)), noise(8, 6), 2),
    "subtracted, without a batch axis": (
        lambda: Fn(lambda m, x: m.f(torch.sub(m.table, x, alpha=2)), table=torch.rand(8, 6)), noise(8, 6), 1,
    ),
    "multiplied": (lambda: Fn(lambda m, x: m.f(x * m.table), table=torch.rand(8, 6)), noise(8, 6), 1),
    "divided by": (lambda: Fn(lambda m, x: m.f(x / m.table), table=torch.rand(8, 6) + 1), noise(8, 6), 1),
    "one feature": (lambda: Fn(lambda m, x: m.f(x * m.table), table=torch.rand(48, 1)[:8]), noise(8, 6), 0),
    "cut": (lambda: Fn(lambda m, x: m.f(x + m.table[:, :8]), table=torch.rand(1, 9, 6)), noise(8, 6), 2),
    "resized": (lambda: Fn(resized, table=torch.rand(1, 9, 6)), noise(8, 6), 2),
    "in windows": (lambda: Fn(windows, table=torch.rand(4, 6)), noise(8, 6), 1),
    "sequence first": (
        lambda: Fn(lambda m, x: m.f(x + m.table), table=torch.rand(5, 1, 6)), sequence_first(5, 6), 2,
    ),
    "an embedding of fixed positions": (
        lambda: Fn(lambda m, x: m.f(x + m.table(torch.arange(8))), table=nn.Embedding(9, 6)), noise(8, 6), 1,
    ),
    "relative positions": (relative_positions, noise(4, 6), 1),
    "several matrices": (lambda: Fn(several_matrices, table=torch.rand(3, 6, 6)), noise(8, 6), 2),
    "added and multiplied": (
        lambda: Fn(lambda m, x: m.f((x + m.table).tanh() * m.table), table=torch.rand(8, 6)), noise(8, 6), 1,
    ),
    "the weight of a layer too": (
        lambda: Fn(lambda m, x: m.f(F.linear(x, m.table).tanh() + m.table), table=torch.rand(6, 6)), noise(6, 6), 0,
    ),
}  # fmt: skip


def with_layer(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def built() -> nn.Module:
        model = build()
        model.f = nn.Linear(6, 4)
        return model

    return built


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of these tests count as large."""
    for module in ("uses", "planner"):
        monkeypatch.setattr(f"stn_fx.compiler.{module}.EXACT_LIMIT", 7)


@pytest.mark.usefixtures("small_limit")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("response", ["rowwise", stn_fx.LowRank(2)], ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_a_large_table_responds_row_by_row(name: str, response: Any) -> None:
    build, inputs, axis = TABLES[name]
    options = {"batch_axis": 1, "name_axis": True} if name == "sequence first" else {}
    subject = Subject(with_layer(build), inputs, response=response, **options)
    assert not list(unconditioned(subject.stn))
    plan = next(each for each in subject.stn.compiled.plan.parameters if each.name.startswith("table"))
    assert (plan.structure, plan.row_axis) == ("row-wise", axis)
    assert plan.reason == "a table, too large for the exact Jacobian"
    for oracle in EVERY_ORACLE:
        for batch in (1, 3):
            oracle(subject, batch)


@pytest.mark.parametrize("name", ["added", "resized", "several matrices"])
def test_a_small_table_keeps_the_exact_jacobian(name: str) -> None:
    build, inputs, _ = TABLES[name]
    stn = stn_fx.transform(with_layer(build)().double(), "weight_decay", inputs(3))
    assert stn.compiled.plan.parameter("table").structure == "exact"


def test_what_is_too_large_and_not_linear_is_told() -> None:
    model = Fn(lambda m, x: m.f(x + m.table.tanh()), table=torch.rand(9000, 8), f=nn.Linear(8, 2))
    stn = stn_fx.transform(model, "weight_decay", (torch.randn(2, 9000, 8),))
    assert "too many for the exact Jacobian" in stn.compiled.plan.parameter("table").reason


def test_the_report_names_the_structure() -> None:
    model = Fn(lambda m, x: m.f(x + m.table), table=torch.rand(1, 9000, 8), f=nn.Linear(8, 2))
    stn = stn_fx.transform(model, "weight_decay", (torch.randn(2, 9000, 8),))
    row = next(each for each in stn.report.to_dict()["parameters"] if each["name"] == "table")
    assert row["structure"] == "row-wise"
    assert "too large for the exact Jacobian" in str(stn.report)
