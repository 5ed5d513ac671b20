import csv
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from stn_fx_cli.main import app
from stn_fx_cli.options import parse_arguments, parse_device, parse_response
from typer.testing import CliRunner

import stn_fx
from stn_fx.errors import InputError

MODEL = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes=10, in_chans=1):
        super().__init__(
            nn.Conv2d(in_chans, 8, 3, stride=2), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(72, num_classes)
        )
"""
QUICK = ["--image-size", "8", "--examples", "300", "--epochs", "2", "--warmup", "1"]


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(MODEL)
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, ["tune", *map(str, arguments)])


def environment():
    """Of a subprocess that imports what this one does."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def plain(text):
    """Output without colours, box drawing and line breaks."""
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", "", text))


def test_tune_ends_with_a_comparison_and_leaves_a_run_folder(model, tmp_path):
    out = tmp_path / "run"
    result = run(model, "--hparams", "dropout,cutout,weight_decay", *QUICK, "--out", out)
    assert result.exit_code == 0, result.output
    text = plain(result.output)
    for expected in ("1,797 images", "tuned epoch 2/2", "inner loss", "validation loss", "dropout.2=", "start values"):
        assert expected in text
    names = {path.name for path in out.iterdir()}
    assert names >= {"values.json", "schedule.json", "schedule.csv", "schedule.png", "history.csv", "model.pt"}
    rows = list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["tuned", "fixed"]
    assert all(0 < float(row["test_loss"]) < 10 for row in rows)
    values = json.loads((out / "values.json").read_text())
    assert set(values["values"]) == {"dropout.2", "cutout.holes", "cutout.length", "weight_decay"}
    assert values["values"] != values["initial_values"]
    assert set(torch.load(out / "model.pt", weights_only=True)) == {"0.weight", "0.bias", "4.weight", "4.bias"}
    how = json.loads((out / "model.json").read_text())
    assert (how["channels"], len(how["classes"]), len(how["mean"])) == (1, 10, 1)


def test_tune_on_a_data_root_of_ones_own(model, tmp_path):
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", x=generator.integers(0, 256, (200, 8, 8), dtype=np.uint8), y=np.arange(200) % 4)
    result = run(model, "--data", tmp_path / "mine.npz", "--epochs", 2, "--warmup", 0, "--no-compare",
                 "--image-size", 8,
                 "--response", "lowrank:2", "--batch-size", 32, "--out", tmp_path / "run")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "4 classes" in result.output
    assert "start values" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "--data", "nowhere"], "no data at nowhere"),
        (["{model}:Nett"], "has no 'Nett'"),
        (["torchvision:resnet81"], "Similar names: resnet18"),
        (["{model}", "--hparams", "dropot"], "dropot"),
        (["{model}", "--hparams", "learning_rate"], "cannot be tuned"),
        (["{model}", "--hparams", "dropout(initial=2)"], "bounds"),
        (["{model}", "--image-size", "9"], "cannot take images of shape (1, 9, 9)"),
        (["{model}", "--model-arg", "num_classes=4"], "10 classes"),
        (["{model}", "--model-arg", "num_classes"], "KEY=VALUE"),
        (["{model}", "--response", "lowrank"], "lowrank:RANK"),
        (["{model}", "--device", "abacus"], "abacus"),
        (["{model}", "--epochs", "2", "--warmup", "2"], "leaves none"),
    ],
)
def test_what_does_not_fit_gives_one_message_and_exit_code_1(model, tmp_path, arguments, message):
    arguments = [argument.format(model=model) for argument in arguments]
    size = [] if "--image-size" in arguments else ["--image-size", "8"]
    result = run(*arguments, *size, "--out", tmp_path / "run")
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stderr.startswith("Error: ")
    assert message in plain(result.stderr)
    assert "Traceback" not in result.output


def test_a_bug_keeps_its_traceback(model, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr("stn_fx_cli.tune.load_images", fail)
    assert isinstance(run(model).exception, ZeroDivisionError)


def test_ctrl_c_exits_cleanly_and_leaves_what_was_written(model, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    monkeypatch.setattr("stn_fx_cli.progress.epoch_line", interrupt)
    result = run(model, *QUICK, "--out", out)
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr
    assert json.loads((out / "values.json").read_text())["interrupted"]


def without_times(folder):
    files = {name: json.loads((folder / name).read_text()) for name in ("schedule.json", "history.json", "values.json")}
    for row in [*files["history.json"], files["values.json"]["best_epoch"]]:
        row.pop("seconds")
    files["values.json"].pop("resumed_at")
    return files, torch.load(folder / "model.pt", weights_only=True)


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_folder_alone_with_the_same_results(model, tmp_path):
    arguments = [model, *QUICK, "--save-every", "2"]
    assert run(*arguments, "--out", tmp_path / "whole").exit_code == 0
    kill = f"""
import os, signal
from stn_fx_cli.main import app
from stn_fx_cli.progress import LiveProgress

def ended(self, trainer, epoch, record):
    self.inner += 1
    if self.inner == 6:
        os.kill(os.getpid(), signal.SIGKILL)

LiveProgress.inner_step_ended = ended
app(["tune", *{list(map(str, arguments))}, "--out", {str(tmp_path / "part")!r}])
"""
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", kill], env=environment(), capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "part" / "checkpoints" / "fixed").exists()
    result = run("--resume", tmp_path / "part")
    assert result.exit_code == 0, result.output
    assert "start values" in result.output
    (files, weights), (expected, expected_weights) = map(without_times, (tmp_path / "part", tmp_path / "whole"))
    assert files == expected
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)


def test_a_run_is_drawn_reported_and_replayed(model, tmp_path):
    out = tmp_path / "run"
    assert run(model, "--hparams", "dropout,cutout,weight_decay", *QUICK, "--no-compare", "--out", out).exit_code == 0
    for command in (["plot", out, "--out", tmp_path / "a.svg"], ["report", out], ["replay", out]):
        result = CliRunner().invoke(app, list(map(str, command)))
        assert result.exit_code == 0, result.output
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert "dropout.2" in (out / "report.html").read_text()
    text = plain(result.output)
    for expected in ("schedule epoch 2/2", "final epoch 2/2", "start epoch 2/2", "from scratch"):
        assert expected in text
    missing = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert missing.exit_code == 1
    assert "holds no run" in plain(missing.stderr)


def test_resume_says_what_does_not_fit(model, tmp_path):
    assert "holds no run" in plain(run("--resume", tmp_path).stderr)
    result = run(model, "--resume", tmp_path, "--epochs", "3")
    assert result.exit_code == 1
    assert "beside it was given: epochs, model" in plain(result.stderr)
    assert "Name a MODEL" in plain(run().stderr)


def test_help_teaches():
    text = plain(run("--help").output)
    for expected in ("torchvision:resnet18", "Hyperparameters", "weight_decay", "run folder", "--device", "--seed"):
        assert expected in text


def test_options():
    assert parse_response("rowwise") == "rowwise"
    assert parse_response("lowrank:4") == stn_fx.LowRank(4)
    assert parse_device("cpu") == torch.device("cpu")
    assert parse_arguments(["a=3", "b=(1, 2)", "c=text", "d=x=y"]) == {"a": 3, "b": (1, 2), "c": "text", "d": "x=y"}
    for text in ("lowrank:0", "lowrank:x", "dense"):
        with pytest.raises(InputError):
            parse_response(text)
