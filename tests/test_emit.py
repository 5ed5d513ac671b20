"""Emitted modules are readable, importable, and compute what the compiled model does."""

import ast
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import stn_fx
from stn_fx.augment.draws import Draws
from stn_fx.compiler.emit import emit, source
from stn_fx.compiler.proof import prove
from stn_fx.errors import StnError
from stn_fx.transform import ResponseForm


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.align = nn.Conv2d(3, 4, 3, padding=1)  # named like a function that the code imports
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.align(x)).relu()
        features = self.drop(x).mean((2, 3))
        return {"logits": self.head(features), "features": features}


def compiled() -> stn_fx.SelfTuningModule:
    torch.manual_seed(0)
    return stn_fx.transform(Net().double(), "dropout,cutout", (torch.randn(3, 3, 6, 6).double(),), seed=0)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("response", ["rowwise", stn_fx.RowWise(3), stn_fx.LowRank(1)])
def test_a_fresh_process_gives_the_same_outputs(tmp_path: Path, response: ResponseForm) -> None:
    torch.manual_seed(0)
    stn = stn_fx.transform(Net(), "dropout,cutout", (torch.randn(3, 3, 6, 6),), response=response, seed=0)
    written = emit(stn.compiled, stn, tmp_path / "net_stn.py")
    proof = prove(written.module, stn.compiled, stn)
    assert proof.failure == ""
    assert {(row.function, row.batch_size) for row in proof.rows} == {
        (name, size) for name in ("base", "linearize_training", "linearize_evaluation", "respond") for size in (3, 4)
    }
    assert proof.passed
    assert proof.difference <= 1e-6


def test_a_module_that_differs_does_not_pass(tmp_path: Path) -> None:
    stn = compiled()
    written = emit(stn.compiled, stn, tmp_path / "net_stn.py")
    code = written.module.read_text()
    written.module.write_text(code.replace("aten.relu.default(", "aten.tanh.default("))
    proof = prove(written.module, stn.compiled, stn)
    assert not proof.failure
    assert not proof.passed
    written.module.write_text("raise RuntimeError('broken')")
    assert "broken" in prove(written.module, stn.compiled, stn).failure


def test_it_reads_like_the_users_code(tmp_path: Path) -> None:
    stn = compiled()
    text = source(stn.compiled, stn, "net_stn")
    assert "# align: x = self.norm(self.align(x)).relu()  (test_emit.py:" in text
    assert "head_linear = aten.linear.default(" in text
    assert "from stn_fx.rules.layout import " in text
    assert max(len(line) for line in text.splitlines()) <= 120
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions] == ["load", "base", "linearize_training", "linearize_evaluation", "respond"]
    for function in functions[1:]:
        assert [a.arg for a in function.args.args] == ["state", "response", "values", "delta", "draws", "x"]


def test_tables_and_tensors_are_what_is_needed_to_run_it(tmp_path: Path) -> None:
    stn = compiled()
    module = load(emit(stn.compiled, stn, tmp_path / "net_stn.py").module)
    assert [each["name"] for each in json.loads(json.dumps(module.HYPERPARAMETERS))] == list(stn.hparams.names)
    assert module.INPUTS == [{"name": "x", "batch_axis": 0}]
    state, response, current = module.load()
    assert set(state) == set(module.STATE)
    assert set(response) == set(module.RESPONSE)
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    values, delta = current.expand(5, -1), torch.zeros(5, len(current), dtype=torch.float64)
    outputs = module.respond(state, response, values, delta, Draws(torch.Generator()), x)
    found = pytree.tree_unflatten(outputs, pytree.treespec_loads(module.OUTPUT_STRUCTURE))
    expected = stn.eval()(x)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], expected[key], atol=1e-12) for key in expected)


def test_a_function_that_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    own = stn_fx.CustomHyperparameter("brighter", lambda x, value, draws: x + value, "input", 0.5)
    stn = stn_fx.transform(Net().double(), [own], (torch.randn(3, 3, 6, 6).double(),), seed=0)
    with pytest.raises(StnError, match=r"cannot be imported by name.*Define it at the top of a module"):
        emit(stn.compiled, stn, tmp_path / "net_stn.py")
    assert not list(tmp_path.iterdir())


def test_a_name_that_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    stn = compiled()
    with pytest.raises(StnError, match="net_1_stn"):
        emit(stn.compiled, stn, tmp_path / "net-1.py")
