"""`stn-fx convert` from a user's file to a proven module, and its messages for what does not fit."""

import json
from pathlib import Path

import pytest
import torch
from stn_fx_cli.main import app
from torch import nn
from typer.testing import CliRunner

from stn_fx.errors import InputError
from stn_fx.example_input import example_input

MODEL = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(4 * 14 * 14, 10)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.conv(x).relu(), 2)
        return self.fc(self.drop(x.flatten(1)))
"""


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_a_file_with_one_class_is_converted_and_proven(tmp_path: Path) -> None:
    file, out, told = tmp_path / "net.py", tmp_path / "code" / "net_stn.py", tmp_path / "report.json"
    file.write_text(MODEL)
    code, text = run(file, "--hparams", "dropout,cutout", "--out", out, "--json", told)
    assert code == 0, text
    assert "2x1x28x28" in text
    assert "first Conv2d" in text
    assert "dropout.drop" in text
    assert "Proven" in text
    assert out.exists()
    assert out.with_suffix(".pt").exists()
    assert json.loads(told.read_text())["totals"]["conditioned_share"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input-shape", "1,30,30"), "does not run on an input of shape 2x1x30x30"),
        (("--input-shape", "1,-3"), "is not a list of sizes"),
        (("--hparams", "dropuot"), "dropuot"),
        (("--response", "rank8"), "lowrank:RANK"),
        (("--out", "no-name.py"), "cannot be imported by name"),
    ],
)
def test_what_does_not_fit_is_one_message_and_exit_code_1(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    file = tmp_path / "net.py"
    file.write_text(MODEL)
    code, text = run(file, *arguments)
    assert code == 1
    assert message in text
    assert "Traceback" not in text


def test_a_missing_file_is_one_message() -> None:
    code, text = run("nowhere.py")
    assert code == 1
    assert "nowhere.py" in text


def test_declared_inputs_come_before_deduced_ones() -> None:
    model = nn.Linear(3, 2)
    assert "declared" in example_input(model, declared={"example_inputs": lambda: (torch.zeros(4, 3),)}).description
    with pytest.raises(InputError, match="declared example_inputs"):
        example_input(model, declared={"example_inputs": (torch.zeros(4, 5),)})


@pytest.mark.parametrize(
    ("model", "shape", "source"),
    [
        (nn.Sequential(nn.Linear(7, 3)), (2, 7), "Linear with 7"),
        (nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 2)), (2, 16), "Embedding of 11"),
        (nn.GRU(6, 4, batch_first=True), (2, 8, 6), "GRU"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 62 * 62, 2)), (2, 3, 64, 64), "3 channels"),
    ],
)
def test_shapes_are_deduced_from_layers(model: nn.Module, shape: tuple[int, ...], source: str) -> None:
    example = example_input(model)
    assert isinstance(example.inputs, tuple)
    assert tuple(example.inputs[0].shape) == shape
    assert source in example.description
    assert all(module.training for module in model.modules())


def test_the_message_names_the_option_where_nothing_can_be_deduced() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x * self.scale + y

    with pytest.raises(InputError, match="--input-shape"):
        example_input(Odd())


def test_a_config_comes_before_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.pretrained_cfg = {"input_size": (3, 40, 48)}  # type: ignore[assignment]
    assert example_input(model).description.startswith("2x3x40x48")
