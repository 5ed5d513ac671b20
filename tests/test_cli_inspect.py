"""`stn-fx inspect`: the report without anything written."""

import json
from pathlib import Path

import pytest
from stn_fx_cli.main import app
from typer.testing import CliRunner, Result

MODEL = """
from torch import nn


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


def net():
    return nn.Sequential(nn.Linear(5, 6), Gate(), nn.Dropout(0.2), nn.Linear(6, 3))
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "net.py"
    file.write_text(MODEL)
    return file


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_report_is_shown_and_nothing_is_written(model: Path) -> None:
    before = set(model.parent.rglob("*"))
    result = run(f"{model}:net", "--hparams", "dropout,weight_decay", "--input-shape", "5")
    assert result.exit_code == 0, result.output
    for told in ("Input: 2x5 as given", "dropout.2", "1 runs as itself", "1.layer.weight", "Cost of a training update"):
        assert told in result.output
    assert {path for path in model.parent.rglob("*") if "__pycache__" not in path.parts} == before


def test_json_on_the_output_stands_there_alone(model: Path) -> None:
    report = json.loads(run(f"{model}:net", "--input-shape", "5", "--json", "-").stdout)
    assert set(report["unconditioned"]) == {"1.layer.weight", "1.layer.bias"}
    assert any("runs as itself" in note for note in report["notes"])


def test_json_in_a_file_comes_with_the_tables(model: Path, tmp_path: Path) -> None:
    told = tmp_path / "report.json"
    result = run(f"{model}:net", "--input-shape", "5", "--response", "lowrank:2", "--json", told)
    assert "Conditioned parameters" in result.output
    assert json.loads(told.read_text())["model"] == "Sequential"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--input-shape", "7"), "does not run on an input of shape 2x7"), (("--hparams", "dropuot"), "dropuot")],
)
def test_what_does_not_fit_is_one_message(model: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(f"{model}:net", *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
