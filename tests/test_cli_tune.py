import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from stn_fx_cli.main import app
from stn_fx_cli.options import parse_arguments, parse_device, parse_response
from stn_fx_cli.replay import Way
from stn_fx_cli.tune_options import TuneOptions, _absolute_data, _absolute_model
from typer.testing import CliRunner

import stn_fx
from stn_fx.bilevel import DeltaSTN, UpdateOptions
from stn_fx.bilevel.schedules import linear
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
        (["{model}", "--clip-norm", "0"], "clip_norm=0"),
        (["{model}", "--average", "1"], "decay=1"),
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
    assert not (tmp_path / "run").exists(), "a command that failed before its run began leaves no folder"


def test_a_run_that_replaces_another_keeps_none_of_its_checkpoints(model, tmp_path):
    out = tmp_path / "run"
    assert run(model, *QUICK, "--out", out).exit_code == 0
    stop = "import stn_fx.bilevel.live_progress as live\nfrom stn_fx_cli.main import app\n"
    stop += "def interrupt(*arguments): raise KeyboardInterrupt\nlive.epoch_line = interrupt\n"
    arguments = [model, *QUICK, "--seed", "7", "--overwrite", "--out", out]
    stop += f"app(['tune', *{list(map(str, arguments))}])"
    subprocess.run([sys.executable, "-W", "ignore", "-c", stop], env=environment(), capture_output=True)
    assert not list((out / "checkpoints" / "fixed").glob("*.pt"))


def test_names_that_need_no_path_stay_as_they_are(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "timm:test_vit", "torchvision:resnet18"):
        (tmp_path / name).mkdir()
    kept = [_absolute_model("timm:test_vit"), _absolute_model("torchvision:resnet18"), _absolute_data("digits")]
    assert kept == ["timm:test_vit", "torchvision:resnet18", "digits"]
    assert _absolute_model("net.py:Net") == f"{tmp_path / 'net.py'}:Net"
    assert _absolute_data("images") == str(tmp_path / "images")


def test_a_failed_command_leaves_an_older_run_as_it_was(model, tmp_path):
    out = tmp_path / "run"
    assert run(model, *QUICK, "--no-compare", "--out", out).exit_code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(model, "--hparams", "dropot", *QUICK, "--overwrite", "--out", out).exit_code == 1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_options_of_training_reach_the_trainer(model, tmp_path, monkeypatch):
    seen = []

    def ended(self, trainer, epoch, record):
        seen.append((trainer.algorithm.updates, trainer.algorithm.optimizers["base"].param_groups[0]["lr"]))
        if isinstance(trainer.algorithm, DeltaSTN):
            assert str(trainer.algorithm.response_step) == (
                "EveryKth(OnFraction(Linearized(antithetic=True), 0.75, least=32), 3)"
            )

    monkeypatch.setattr("stn_fx.bilevel.live_progress.LiveProgress.inner_step_ended", ended)
    out = tmp_path / "run"
    result = run(model, *QUICK, "--accumulate", "2", "--clip-norm", "0.5", "--bf16", "--schedule", "warmup-cosine",
                 "--average", "0.9", "--keep", "3", "--save-every", "1", "--no-trust", "--batch-size", "16",
                 "--train-steps", "1", "--response-every", "3",
                 "--response-fraction", "0.75", "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert {each for each, _ in seen} == {UpdateOptions(accumulate=2, clip_norm=0.5, autocast=torch.bfloat16)}
    rates = [rate for _, rate in seen[: len(seen) // 2]]  # of the tuned run
    assert rates[0] < max(rates) == pytest.approx(1e-3)
    assert rates[-1] < 0.1 * max(rates)
    assert len(list((out / "checkpoints" / "tuned").glob("step-*.pt"))) == 3
    assert "Averaged weights" in result.output
    averaged, weights = (torch.load(out / name, weights_only=True) for name in ("model-average.pt", "model.pt"))
    assert set(averaged) == set(weights)
    assert not torch.equal(averaged["4.weight"], weights["4.weight"])
    assert all(each["trust"] is None for each in json.loads((out / "history.json").read_text()))


def test_linear_rates_fall_to_zero():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.5)
    scheduler, rates = linear(optimizer, 4), []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.5, 0.375, 0.25, 0.125])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_tensorboard_says_what_is_missing_or_writes_a_log(model, tmp_path):
    result = run(model, *QUICK, "--no-compare", "--tensorboard", "--out", tmp_path / "run")
    if find_spec("tensorboard"):
        assert result.exit_code == 0, result.output
        assert list((tmp_path / "run" / "tensorboard" / "tuned").glob("events*"))
    else:
        assert "pip install tensorboard" in plain(result.stderr)
        assert not (tmp_path / "run").exists()


def test_options_of_an_older_run_are_read(model, tmp_path):
    assert run(model, *QUICK, "--no-compare", "--out", tmp_path).exit_code == 0
    kept = json.loads((tmp_path / "options.json").read_text())
    for later in ("accumulate", "clip_norm", "bf16", "average", "keep", "tensorboard", "trust"):
        del kept[later]
    (tmp_path / "options.json").write_text(json.dumps(kept))
    assert TuneOptions.read(tmp_path).recipe().options["updates"] == UpdateOptions()


def test_a_bug_keeps_its_traceback(model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where the run folder would be

    def fail(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr("stn_fx_cli.tune_task.load_images", fail)
    assert isinstance(run(model).exception, ZeroDivisionError)


def test_ctrl_c_exits_cleanly_and_leaves_what_was_written(model, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    monkeypatch.setattr("stn_fx.bilevel.live_progress.epoch_line", interrupt)
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
    arguments = [model, *QUICK, "--save-every", "2", "--schedule", "warmup-cosine", "--average", "0.9"]
    assert run(*arguments, "--out", tmp_path / "whole").exit_code == 0
    kill = f"""
import os, signal
from stn_fx_cli.main import app
from stn_fx.bilevel.live_progress import LiveProgress

seen = []
def ended(self, trainer, epoch, record):
    seen.append(epoch)
    if len(seen) == 6:
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
    averages = [torch.load(tmp_path / each / "model-average.pt", weights_only=True) for each in ("part", "whole")]
    assert all(torch.equal(averages[0][name], value) for name, value in averages[1].items())
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)


def test_a_run_is_drawn_reported_and_replayed(model, tmp_path):
    out = tmp_path / "run"
    assert run(model, "--hparams", "dropout,cutout,weight_decay", *QUICK, "--no-compare", "--out", out).exit_code == 0
    for command in (["plot", out, "--out", tmp_path / "a"], ["report", out, "--out", tmp_path / "no" / "a.html"]):
        result = CliRunner().invoke(app, list(map(str, command)))
        assert result.exit_code == 1
        assert "--out" in plain(result.stderr)
    for command in (["plot", out, "--out", tmp_path / "a.svg"], ["report", out], ["replay", out]):
        result = CliRunner().invoke(app, list(map(str, command)))
        assert result.exit_code == 0, result.output
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert "dropout.2" in (out / "report.html").read_text()
    text = plain(result.output)
    for expected in ("schedule epoch 2/2", "final epoch 2/2", "start epoch 2/2", "perturbed epoch 2/2", "from scratch"):
        assert expected in text
    schedules = {way: json.loads((out / "replay" / way / "schedule.json").read_text()) for way in Way}
    tuned = json.loads((out / "schedule.json").read_text())
    for way, point in ((Way.SCHEDULE, tuned[-1]), (Way.FINAL, tuned[-1]), (Way.START, tuned[0])):
        assert schedules[way][-1]["values"] == pytest.approx(point["values"], rel=1e-5, abs=1e-5), way
    assert schedules[Way.SCHEDULE][1]["values"] != schedules[Way.FINAL][1]["values"]
    assert schedules[Way.PERTURBED][-1]["values"] != schedules[Way.FINAL][-1]["values"]
    weights = [torch.load(out / "replay" / way / "model.pt", weights_only=True)["4.weight"] for way in Way]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(weights, 2))
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
    assert parse_response("rowwise") == stn_fx.RowWise()
    assert parse_response("rowwise:3") == stn_fx.RowWise(3)
    assert parse_response("lowrank:4") == stn_fx.LowRank(4)
    assert parse_device("cpu") == torch.device("cpu")
    assert parse_arguments(["a=3", "b=(1, 2)", "c=text", "d=x=y"]) == {"a": 3, "b": (1, 2), "c": "text", "d": "x=y"}
    for text in ("lowrank:0", "lowrank:x", "rowwise:0", "rowwise:", "dense"):
        with pytest.raises(InputError):
            parse_response(text)
