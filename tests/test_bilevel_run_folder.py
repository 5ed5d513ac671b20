import csv
import json
from contextlib import nullcontext

import pytest
import torch
from bilevel_fake import FakeSelfTuningModule, classification_batches
from torch import nn

from stn_fx.bilevel import BilevelTrainer, Callback, Checkpoint, RunFolder
from stn_fx.bilevel.atomic import write_atomically
from stn_fx.errors import InputError

TRAIN, VALID = classification_batches(0), classification_batches(1)


def run(path, *callbacks, epochs=3, overwrite=False):
    stn = FakeSelfTuningModule(nn.Linear(8, 3, dtype=torch.float64), "weight_decay,label_smoothing")
    trainer = BilevelTrainer(stn, train=TRAIN, valid=VALID)
    return stn, trainer.fit(epochs, warmup_epochs=1, train_steps=2, callbacks=[RunFolder(path, overwrite), *callbacks])


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_values_schedule_history_picture_and_weights(tmp_path):
    path = tmp_path / "runs" / "first"
    stn, result = run(path)
    assert sorted(p.name for p in path.iterdir()) == [
        "history.csv", "history.json", "model.pt", "schedule.csv", "schedule.json", "schedule.png", "values.json",
    ]  # fmt: skip

    values = json.loads((path / "values.json").read_text())
    assert values["values"] == result.values
    assert values["initial_values"] == result.schedule[0].values
    assert values["best_epoch"]["epoch"] == result.best.epoch
    assert {spec["name"] for spec in values["hyperparameters"]} == set(result.values)

    schedule = json.loads((path / "schedule.json").read_text())
    rows = read_csv(path / "schedule.csv")
    assert len(schedule) == len(rows) == len(result.schedule)
    assert float(rows[-1]["weight_decay"]) == schedule[-1]["values"]["weight_decay"] == result.values["weight_decay"]
    assert float(rows[-1]["label_smoothing scale"]) == result.schedule[-1].scales["label_smoothing"]

    history = json.loads((path / "history.json").read_text())
    assert [row["valid_loss"] for row in history] == [record.valid_loss for record in result.history]
    assert len(read_csv(path / "history.csv")) == 3

    assert (path / "schedule.png").read_bytes().startswith(b"\x89PNG")
    plain = nn.Linear(8, 3, dtype=torch.float64)
    plain.load_state_dict(torch.load(path / "model.pt", weights_only=True))
    best_is_last = result.best is result.history[-1]
    assert torch.equal(plain.weight, stn.model.weight) == best_is_last


class Interrupt(Callback):
    def epoch_ended(self, trainer, record, result):
        raise KeyboardInterrupt


def test_an_interrupted_run_leaves_what_there_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Interrupt())
    assert json.loads((tmp_path / "values.json").read_text())["interrupted"]
    assert len(json.loads((tmp_path / "history.json").read_text())) == 1
    assert (tmp_path / "schedule.png").exists()
    assert (tmp_path / "model.pt").exists()


def test_a_run_is_not_overwritten_unasked(tmp_path):
    run(tmp_path, epochs=2)
    with pytest.raises(InputError, match="holds a run already"):
        run(tmp_path)
    run(tmp_path, epochs=2, overwrite=True)


def test_a_run_that_replaces_another_leaves_nothing_of_it(tmp_path):
    run(tmp_path, epochs=2)
    for name in ("model.pt", "history.csv", "schedule.png"):
        (tmp_path / name).write_text("of the older run")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Stop(), overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "history.json", "schedule.csv", "schedule.json", "values.json",
    ]  # fmt: skip


def test_a_run_that_another_callback_refuses_replaces_nothing(tmp_path):
    run(tmp_path / "run", Checkpoint(tmp_path / "saved"), epochs=2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="holds checkpoints of a run already"):
        run(tmp_path / "run", Checkpoint(tmp_path / "saved"), epochs=2, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


class Stop(Callback):
    def inner_step_ended(self, trainer, epoch, record):
        raise KeyboardInterrupt


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        RunFolder(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be made"):
        RunFolder(tmp_path / "file" / "below")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    def fail(path):
        path.write_text("half")
        raise RuntimeError

    write_atomically(tmp_path / "a.txt", lambda path: path.write_text("old"))
    with pytest.raises(RuntimeError):
        write_atomically(tmp_path / "a.txt", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


class StopInEpoch(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def inner_step_ended(self, trainer, epoch, record):
        if epoch == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize("folder", ["run", "empty", "of another run"])
def test_going_on_in_another_folder_tells_that_the_best_weights_are_elsewhere(tmp_path, folder):
    def fit(folder, *callbacks, **options):
        torch.manual_seed(0)
        stn = FakeSelfTuningModule(nn.Linear(8, 3, dtype=torch.float64), "weight_decay,label_smoothing")
        trainer = BilevelTrainer(stn, train=TRAIN, valid=VALID)
        checkpoint = Checkpoint(tmp_path / "checkpoints", every_steps=1)
        trainer.fit(4, warmup_epochs=1, callbacks=[RunFolder(folder, True), checkpoint, *callbacks], **options)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", StopInEpoch(3))
    if folder == "of another run":
        run(tmp_path / folder)
    warns = pytest.warns(UserWarning, match="not the folder of the run that goes on")
    with nullcontext() if folder == "run" else warns:
        fit(tmp_path / folder, resume_from=tmp_path / "checkpoints")
