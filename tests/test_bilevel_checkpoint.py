"""A run that is killed and resumed gives bit for bit what one gives that is not."""

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import resumable_run
import torch
import torch.nn.functional as F
from bilevel_fake import FakeSelfTuningModule, classification_batches
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

from stn_fx.bilevel import (
    BilevelTrainer,
    Callback,
    Checkpoint,
    FixedHyperparameters,
    KeepBest,
    LearningRateSchedule,
    Linearized,
    PerBatch,
    Terminated,
    UpdateOptions,
    WeightAverage,
)
from stn_fx.bilevel.checkpoint_file import checkpoints_in, read_checkpoint, require_plain, write_checkpoint
from stn_fx.bilevel.fit import PARTS
from stn_fx.bilevel.generators import Generators, generators_in
from stn_fx.bilevel.reader import BatchReader
from stn_fx.bilevel.schedules import cosine, linear
from stn_fx.errors import CheckpointError, InputError

TRAIN, VALID = classification_batches(0), classification_batches(1, examples=40)


def everything(trainer, result, keep):
    """All that a run leaves, without times."""
    return {
        "schedule": result.schedule,
        "history": [replace(record, seconds=0.0) for record in result.history],
        "state": trainer.stn.state_dict(),
        "algorithm": trainer.algorithm.state_dict(),
        "best": keep.state_dict()["state"],
        "generators": Generators(trainer.stn, {"train": trainer.train, "valid": trainer.valid}).state(),
    }


def assert_identical(first, second, path=""):
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_identical(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_identical(a, b, f"{path}/{index}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    else:
        assert first == second, path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return everything(*resumable_run.run(tmp_path_factory.mktemp("whole")))


def killed_subprocess(folder, steps):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-W", "ignore", resumable_run.__file__, str(folder), str(steps)]
    return subprocess.run(command, env=environment, check=False).returncode


@pytest.mark.slow
def test_a_killed_run_that_is_resumed_is_bit_identical(tmp_path, uninterrupted):
    # 9 steps an epoch, saved every 4: killed in the middle of the second epoch, then again in the third.
    assert killed_subprocess(tmp_path, 14) == -signal.SIGKILL
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-0000000009.pt", "step-0000000012.pt"]
    assert killed_subprocess(tmp_path, 10) == -signal.SIGKILL
    trainer, result, keep = resumable_run.run(tmp_path)
    assert result.resumed_at == [12, 20]
    assert not result.interrupted
    assert_identical(everything(trainer, result, keep), uninterrupted)


@pytest.mark.parametrize("step", [3, 9, 36])
def test_resuming_is_bit_identical_from_every_kind_of_position(tmp_path, uninterrupted, step):
    """Without an outer step so far; after the last step of an epoch, before its evaluation; at the very end."""

    class Stop(Callback):
        def safe_point(self, trainer, point):
            if point.inner_step == step and not point.epoch_ended:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        resumable_run.run(tmp_path, Stop(), every_steps=1)
    assert checkpoints_in(tmp_path)[-1].name == f"step-{step:010d}.pt"
    random.seed(99)
    torch.manual_seed(99)
    assert_identical(everything(*resumable_run.run(tmp_path)), uninterrupted)


def test_loaders_with_workers_resume_too(tmp_path):
    class Stop(Callback):
        def safe_point(self, trainer, point):
            if point.inner_step == 13:
                raise ZeroDivisionError

    whole = everything(*resumable_run.run(tmp_path / "whole", workers=2))
    with pytest.raises(ZeroDivisionError):
        resumable_run.run(tmp_path / "part", Stop(), workers=2)
    assert_identical(everything(*resumable_run.run(tmp_path / "part", workers=2)), whole)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_ctrl_c_and_sigterm_finish_the_update_save_and_stop(tmp_path, uninterrupted, number, error):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(error):
        resumable_run.run(tmp_path, resumable_run.KillAfter(15, number))
    assert checkpoints_in(tmp_path)[-1].name == "step-0000000015.pt"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert_identical(everything(*resumable_run.run(tmp_path)), uninterrupted)


def test_a_second_ctrl_c_acts_at_once():
    class Twice(Callback):
        def __init__(self):
            self.reached = False

        def inner_step_ended(self, trainer, epoch, record):
            signal.raise_signal(signal.SIGINT)
            self.reached = True
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("not reached")

    callback = Twice()
    with pytest.raises(KeyboardInterrupt):
        fake_trainer().fit(2, callbacks=[callback])
    assert callback.reached


def summed(output, target):
    return 2 * F.cross_entropy(output, target)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def fake_trainer(hparams="weight_decay,label_smoothing", outputs=3, algorithm=None, layer=nn.Linear, **options):
    torch.manual_seed(0)
    stn = FakeSelfTuningModule(layer(8, outputs, dtype=torch.float64), hparams)
    return BilevelTrainer(stn, train=TRAIN, valid=VALID, algorithm=algorithm and algorithm(stn), **options)


def test_the_last_checkpoints_are_kept_and_nothing_else(tmp_path):
    fake_trainer().fit(6, callbacks=[Checkpoint(tmp_path, keep=3)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{4 * e:010d}.pt" for e in (4, 5, 6)]
    (tmp_path / ".step-0000000099-abc.pt").touch()  # what a kill in the middle of writing leaves
    with pytest.raises(InputError, match="resume_from"):
        fake_trainer().fit(2, callbacks=[Checkpoint(tmp_path)])
    fake_trainer().fit(2, callbacks=[Checkpoint(tmp_path, overwrite=True)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{4 * e:010d}.pt" for e in (1, 2)]


def test_resuming_an_earlier_checkpoint_does_anew_what_came_after_it(tmp_path):
    whole = fake_trainer().fit(5, callbacks=[Checkpoint(tmp_path, keep=4)])
    early = tmp_path / "step-0000000008.pt"
    again = fake_trainer().fit(5, callbacks=[Checkpoint(tmp_path, keep=4)], resume_from=early)
    assert again.schedule == whole.schedule
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step-{4 * e:010d}.pt" for e in (2, 3, 4, 5)]


def test_persistent_workers_are_told_to_keep_what_they_draw(tmp_path):
    trainer = fake_trainer()
    trainer.train = DataLoader(TensorDataset(*TRAIN[0]), 8, num_workers=1, persistent_workers=True)
    with pytest.warns(UserWarning, match="training loader has persistent workers.*persistent_workers=False"):
        trainer.fit(1, warmup_epochs=0, train_steps=1, callbacks=[Checkpoint(tmp_path)])


def test_a_finished_run_resumes_to_its_end(tmp_path):
    first = fake_trainer().fit(2, callbacks=[Checkpoint(tmp_path)])
    second = fake_trainer().fit(2, callbacks=[Checkpoint(tmp_path)], resume_from=tmp_path)
    assert second.schedule == first.schedule
    assert second.history == first.history


@pytest.mark.parametrize(
    ("other", "fit", "differences"),
    [
        ({"outputs": 4}, {}, ["tensor model.weight is float64 [3, 8] in the checkpoint and float64 [4, 8] here"]),
        ({"hparams": "weight_decay"}, {}, ["only in the checkpoint: hyperparameter label_smoothing"]),
        ({"hparams": "weight_decay(high=0.5),label_smoothing"}, {}, ["weight_decay high is 1.0", "and 0.5 here"]),
        (
            {"base_optimizer": partial(Adam, lr=1e-3)},
            {},
            ["base class is SGD in the checkpoint and Adam here"],
        ),
        (
            {"algorithm": FixedHyperparameters},
            {},
            ["class is DeltaSTN", "only in the checkpoint: optimizer hyper"],
        ),
        (
            {"response_step": Linearized(antithetic=False)},
            {},
            ["EveryKth(OnFraction(Linearized(antithetic=True), 0.5, least=32), 4)"],
        ),
        ({"sampling": PerBatch()}, {}, ["sampling is PerExample() in the checkpoint and PerBatch() here"]),
        ({"updates": UpdateOptions(clip_norm=1.0)}, {}, ["clip_norm=None", "clip_norm=1.0"]),
        ({"entropy_weight": 0.5}, {}, ["entropy weight is 0.001 in the checkpoint and 0.5 here"]),
        ({"base_optimizer": partial(SGD, lr=0.5)}, {}, ["optimizer base lr is 0.01 in the checkpoint and 0.5 here"]),
        ({"loss": summed}, {}, ["algorithm loss is cross_entropy in the checkpoint and summed here"]),
        (
            {"layer": Scaled},
            {},
            ["module model is Linear(in_features=8,", "and Scaled here"],
        ),
        ({"loss": nn.CrossEntropyLoss(label_smoothing=0.5)}, {}, ["CrossEntropyLoss(", "label_smoothing=0.5) here"]),
        ({"loss": partial(F.cross_entropy, label_smoothing=0.5)}, {}, ["and cross_entropy(label_smoothing=0.5) here"]),
        ({}, {"epochs": 5, "warmup_epochs": 2}, ["epochs is 3 in", "and 5 here", "warmup_epochs is 1"]),
        ({}, {"callbacks": [KeepBest()]}, ["callback is [] in the checkpoint and ['KeepBest'] here"]),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_differences(tmp_path, other, fit, differences):
    fake_trainer().fit(3, warmup_epochs=1, callbacks=[Checkpoint(tmp_path)])
    trainer = fake_trainer(**other)
    before = {name: p.clone() for name, p in trainer.stn.named_parameters()}
    with pytest.raises(CheckpointError) as error:
        trainer.fit(**{"epochs": 3, "warmup_epochs": 1, "resume_from": tmp_path, **fit})
    for difference in differences:
        assert difference in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in trainer.stn.named_parameters())


def test_a_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    fake_trainer().fit(2, callbacks=[Checkpoint(tmp_path)])
    monkeypatch.setattr("stn_fx.bilevel.checkpoint_file.package_version", lambda: "99.0")
    with pytest.raises(CheckpointError, match=r"stn_fx is .* in it and 99\.0 here"):
        fake_trainer().fit(2, resume_from=tmp_path)


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        fake_trainer().fit(2, resume_from=tmp_path)
    with pytest.raises(CheckpointError, match="No such file"):
        fake_trainer().fit(2, resume_from=tmp_path / "missing.pt")
    (tmp_path / "step-1.pt").write_bytes(b"no checkpoint at all")
    with pytest.raises(CheckpointError, match="no checkpoint of stn_fx"):
        fake_trainer().fit(2, resume_from=tmp_path)


def test_callbacks_of_other_settings_are_refused(tmp_path):
    cases = [
        (LearningRateSchedule(cosine), LearningRateSchedule(linear), "LearningRateSchedule(linear"),
        (WeightAverage(0.9), WeightAverage(0.5), "WeightAverage(0.5)"),
    ]
    for number, (theirs, ours, difference) in enumerate(cases):
        folder = tmp_path / str(number)
        fake_trainer().fit(2, callbacks=[theirs, Checkpoint(folder)])
        with pytest.raises(CheckpointError) as error:
            fake_trainer().fit(2, callbacks=[ours], resume_from=folder)
        assert difference in str(error.value)


def decaying(optimizer, steps, gamma):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)


def test_what_identifies_a_run_is_the_same_in_another_process():
    """No addresses in memory, by which a run would be refused its own checkpoint."""
    schedule = LearningRateSchedule(partial(decaying, gamma=0.9)).description()
    assert schedule == "LearningRateSchedule(decaying(gamma=0.9), followed by hyper, scale)"


def test_the_parts_that_a_checkpoint_must_have_are_those_that_it_has(tmp_path):
    fake_trainer().fit(2, callbacks=[Checkpoint(tmp_path)])
    assert set(read_checkpoint(checkpoints_in(tmp_path)[-1])[1]) == set(PARTS)


def damaged(path, change):
    """Rewrite what is in a checkpoint."""
    content = torch.load(path, weights_only=True)
    torch.save(change(content), path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: torch.ones(3), "identity or state is missing"),
        (lambda content: {"identity": 3, "state": {}}, "identity or state is missing"),
        (lambda content: content | {"state": {}}, "epoch is missing"),
        (lambda content: content | {"state": content["state"] | {"generators": {}}}, "generators is missing"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_and_nothing_is_lost(tmp_path, change, reason):
    fake_trainer().fit(4, callbacks=[Checkpoint(tmp_path, keep=3)])
    first, *later = checkpoints_in(tmp_path)
    damaged(first, change)
    trainer = fake_trainer()
    before = {name: p.clone() for name, p in trainer.stn.named_parameters()}
    with pytest.raises(CheckpointError, match=reason):
        trainer.fit(4, callbacks=[Checkpoint(tmp_path, keep=3)], resume_from=first)
    assert checkpoints_in(tmp_path) == [first, *later]
    assert all(torch.equal(p, before[name]) for name, p in trainer.stn.named_parameters())


def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path):
    fake_trainer().fit(2, callbacks=[Checkpoint(tmp_path, keep=1)])
    (path,) = checkpoints_in(tmp_path)
    weights = read_checkpoint(path)[1]["stn"]["model.weight"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(weights) + 7] ^= 64
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="check sum"):
        fake_trainer().fit(2, resume_from=tmp_path)


class Fails(Callback):
    def fit_started(self, trainer, epochs, result):
        raise OSError("disk")


def test_a_resumed_run_that_fails_at_its_start_loses_no_checkpoint(tmp_path):
    fake_trainer().fit(4, callbacks=[Checkpoint(tmp_path, keep=3)])
    before = checkpoints_in(tmp_path)
    with pytest.raises(OSError, match="disk"):
        fake_trainer().fit(4, callbacks=[Checkpoint(tmp_path, keep=3), Fails()], resume_from=before[0])
    assert checkpoints_in(tmp_path) == before


def test_a_run_that_is_resumed_elsewhere_leaves_the_checkpoints_of_another_alone(tmp_path):
    for name in "ab":
        fake_trainer().fit(4, callbacks=[Checkpoint(tmp_path / name, keep=3)])
    before = checkpoints_in(tmp_path / "b")
    early = checkpoints_in(tmp_path / "a")[0]
    with pytest.raises(InputError, match="holds checkpoints of a run already"):
        fake_trainer().fit(4, callbacks=[Checkpoint(tmp_path / "b")], resume_from=early)
    assert checkpoints_in(tmp_path / "b") == before
    fake_trainer().fit(4, callbacks=[Checkpoint(tmp_path / "c", keep=9)], resume_from=early)
    assert [path.name for path in checkpoints_in(tmp_path / "c")] == [path.name for path in before[1:]]


class Malicious:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_nothing_that_executes_code_is_written_or_read(tmp_path):
    with pytest.raises(CheckpointError, match=r"state/a/1 is a .*Malicious"):
        write_checkpoint(tmp_path / "step-1.pt", {}, {"a": [1, Malicious()]})
    torch.save({"identity": {}, "state": Malicious()}, tmp_path / "step-1.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of stn_fx"):
        read_checkpoint(tmp_path / "step-1.pt")


def test_state_that_cannot_be_stored_is_told_after_the_first_step(tmp_path):
    class Odd(Callback):
        def state_dict(self):
            return {"function": len}

    trainer = fake_trainer()
    with pytest.raises(CheckpointError, match="callbacks/0/function"):
        trainer.fit(2, callbacks=[Odd(), Checkpoint(tmp_path)])
    require_plain({"a": [1, 2.0, "b", None, True, (torch.ones(1),)], 3: {}})


def test_options_of_checkpoints_are_checked(tmp_path):
    with pytest.raises(InputError, match="keep=0"):
        Checkpoint(tmp_path, keep=0)
    with pytest.raises(InputError, match="every_steps=0"):
        Checkpoint(tmp_path, every_steps=0)


class Unsized:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (list, r"batches of the loader train is 4 in .* and 2 here"),
        (Unsized, "after 3 batches of a pass over the trai"),
    ],
)
def test_a_loader_that_became_shorter_is_refused(tmp_path, loader, message):
    class Stop(Callback):
        def safe_point(self, trainer, point):
            if point.inner_step == 3:
                raise ZeroDivisionError

    trainer = fake_trainer()
    trainer.train = loader(TRAIN)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(2, callbacks=[Checkpoint(tmp_path, every_steps=1), Stop()])
    trainer = fake_trainer()
    trainer.train = loader(TRAIN[:2])
    with pytest.raises(CheckpointError, match=message):
        trainer.fit(2, resume_from=tmp_path)


def test_buffers_outside_of_the_state_dict_are_kept(tmp_path):
    trainer = fake_trainer()
    trainer.stn.model.register_buffer("count", torch.full((1,), 7.0), persistent=False)
    trainer.fit(2, callbacks=[Checkpoint(tmp_path)])
    other = fake_trainer()
    other.stn.model.register_buffer("count", torch.zeros(1), persistent=False)
    other.fit(2, resume_from=tmp_path)
    assert other.stn.model.count == 7


def test_a_reader_passes_over_the_loader_again_and_again_and_refuses_an_empty_one():
    generators = Generators(fake_trainer().stn, {})
    batches = BatchReader([1, 2], "validation", generators).endless()
    assert [next(batches) for _ in range(5)] == [1, 2, 1, 2, 1]
    with pytest.raises(InputError, match="validation loader is empty"):
        next(BatchReader([], "validation", generators).endless())


def test_generators_are_found_wherever_a_loader_holds_them():
    class Holder:
        pass

    loader, data = Holder(), Holder()
    loader.generator = loader.same = torch.Generator()
    loader.dataset, data.transforms, data.back = data, [random.Random(1)], loader
    assert [path for path, _ in generators_in(loader)] == ["generator", "dataset.transforms.0"]


def test_optimizers_of_ones_own_keep_their_state(tmp_path):
    def trainer():
        return fake_trainer(base_optimizer=partial(SGD, lr=0.01, momentum=0.9, nesterov=True))

    class Stop(Callback):
        def safe_point(self, trainer, point):
            if point.inner_step == 6:
                raise ZeroDivisionError

    whole = trainer()
    whole.fit(3)
    with pytest.raises(ZeroDivisionError):
        trainer().fit(3, callbacks=[Checkpoint(tmp_path), Stop()])
    resumed = trainer()
    resumed.fit(3, resume_from=tmp_path)
    assert_identical(resumed.algorithm.state_dict(), whole.algorithm.state_dict())
