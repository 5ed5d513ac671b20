import math

import pytest
import torch
from bilevel_fake import FakeSelfTuningModule, classification_batches
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stn_fx.bilevel import (
    BilevelTrainer,
    Callback,
    Checkpoint,
    DeltaSTN,
    EpochRecord,
    FitResult,
    FixedHyperparameters,
    KeepBest,
    LearningRateSchedule,
    UpdateOptions,
    WeightAverage,
    evaluate,
)
from stn_fx.bilevel.trainer import usual_warmup
from stn_fx.errors import DivergedError, InputError

TRAIN, VALID = classification_batches(0), classification_batches(1, examples=40)
NAMES = ("weight_decay", "label_smoothing")


def make_trainer(algorithm=None, captured=True, **options):
    torch.manual_seed(0)
    stn = FakeSelfTuningModule(nn.Linear(8, 3, dtype=torch.float64), ",".join(NAMES), captured)
    return BilevelTrainer(stn, train=TRAIN, valid=VALID, algorithm=algorithm and algorithm(stn), **options)


def test_a_result_holds_schedule_history_values_and_best():
    trainer = make_trainer()
    result = trainer.fit(5, warmup_epochs=1, train_steps=2)
    assert [record.epoch for record in result.history] == [1, 2, 3, 4, 5]
    assert result.history[-1].inner_step == 20
    assert result.history[-1].outer_step == 8
    assert [point.inner_step for point in result.schedule] == [0, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert result.schedule[0].values != result.values == trainer.stn.hparams.values()
    assert set(result.schedule[-1].scales) == set(NAMES)
    assert result.best.valid_loss == min(record.valid_loss for record in result.history)
    assert result.history[-1].valid_loss < result.history[0].valid_loss
    assert not result.interrupted


@pytest.mark.parametrize(("train_steps", "valid_steps", "expected"), [(5, 1, 4), (4, 3, 15), (20, 2, 2)])
def test_inner_and_outer_steps_alternate(train_steps, valid_steps, expected):
    result = make_trainer().fit(5, warmup_epochs=0, train_steps=train_steps, valid_steps=valid_steps)
    assert result.history[-1].outer_step == expected


def test_a_run_without_room_for_an_outer_step_says_so():
    with pytest.warns(UserWarning, match="Nothing was tuned"):
        result = make_trainer().fit(5, warmup_epochs=0, train_steps=100)
    assert result.history[-1].outer_step == 0


def test_the_same_seed_gives_the_same_run():
    first, second = (make_trainer().fit(3, warmup_epochs=1) for _ in range(2))
    assert first.schedule == second.schedule
    assert [r.valid_loss for r in first.history] == [r.valid_loss for r in second.history]


def test_the_baseline_leaves_hyperparameters_alone():
    result = make_trainer(FixedHyperparameters).fit(2)
    assert result.values == result.schedule[0].values
    assert result.history[-1].outer_step == 0
    assert result.history[-1].response_loss is None


def test_the_model_is_captured_from_the_first_batch():
    trainer = make_trainer(captured=False)
    assert set(trainer.fit(2, warmup_epochs=1).values) == set(NAMES)


class Recorder(Callback):
    def __init__(self, fail_at=None):
        self.events, self.fail_at, self.result = [], fail_at, None

    def fit_started(self, trainer, epochs, result):
        self.events.append(f"start {epochs}")

    def inner_step_ended(self, trainer, epoch, record):
        self.events.append("inner")

    def outer_step_ended(self, trainer, epoch, result):
        self.events.append("outer")

    def epoch_ended(self, trainer, record, result):
        self.events.append(f"epoch {record.epoch}")
        if record.epoch == self.fail_at:
            raise KeyboardInterrupt

    def fit_ended(self, trainer, result):
        self.events.append("end")
        self.result = result


def test_callbacks_see_every_event_in_order():
    recorder = Recorder()
    make_trainer().fit(2, warmup_epochs=1, train_steps=4, callbacks=[recorder])
    assert recorder.events == [
        "start 2", *["inner"] * 4, "epoch 1", *["inner"] * 4, "outer", "epoch 2", "end",
    ]  # fmt: skip


def test_callbacks_see_what_there_was_when_training_is_interrupted():
    recorder = Recorder(fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        make_trainer().fit(5, warmup_epochs=1, callbacks=[recorder])
    assert recorder.events[-1] == "end"
    assert len(recorder.result.history) == 2
    assert recorder.result.interrupted


def test_the_best_state_can_be_put_back():
    trainer, keep = make_trainer(), KeepBest()
    trainer.fit(2, warmup_epochs=1, callbacks=[keep])
    best = {name: value.clone() for name, value in trainer.stn.state_dict().items() if isinstance(value, torch.Tensor)}
    with torch.no_grad():
        for parameter in trainer.stn.parameters():
            parameter.add_(1)
    keep.restore(trainer)
    assert all(torch.equal(trainer.stn.state_dict()[name], value) for name, value in best.items())


def test_evaluation_is_the_mean_over_examples_and_leaves_modes():
    trainer = make_trainer()
    trainer.stn.train()
    trainer.stn.model.eval()
    result = evaluate(trainer.stn, nn.functional.cross_entropy, VALID)  # the last batch is smaller
    x, y = (torch.cat(each) for each in zip(*VALID, strict=True))
    output = trainer.stn.model(x)
    assert result.loss == pytest.approx(nn.functional.cross_entropy(output, y).item())
    assert result.accuracy == pytest.approx((output.argmax(1) == y).double().mean().item())
    assert result.examples == 40
    assert trainer.stn.training
    assert not trainer.stn.model.training


def test_accuracy_is_told_for_classifications_only():
    stn = FakeSelfTuningModule(nn.Linear(8, 1, dtype=torch.float64))
    batches = [(torch.zeros(4, 8, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64))]
    assert evaluate(stn, nn.functional.mse_loss, batches).accuracy is None


@pytest.mark.parametrize(
    ("epochs", "updates", "warmup"),
    [
        (100, 11, 40),  # short epochs: at most two fifths
        (40, 33, 16),
        (60, 25, 20),  # 500 updates
        (64, 66, 12),  # long ones: at least a fifth
        (3, 1000, 1),
        (2, 1, 1),
        (1, 1, 0),
        (10, None, 4),
    ],
)
def test_the_usual_warmup_is_as_long_as_a_response_takes(epochs, updates, warmup):
    assert usual_warmup(epochs, updates) == warmup


@pytest.mark.parametrize(("accumulate", "first_tuned"), [(1, 3), (5, 4)])
def test_the_usual_warmup_counts_updates_not_batches(accumulate, first_tuned):
    trainer = make_trainer(updates=UpdateOptions(accumulate=accumulate))
    trainer.train = [TRAIN[0]] * 250
    result = trainer.fit(8, train_steps=50)
    assert next(record.epoch for record in result.history if record.outer_step) == first_tuned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"train_steps": 0}, "train_steps=0"),
        ({"epochs": 1.5}, "epochs=1.5: a whole number"),
        ({"epochs": True}, "epochs=True"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1"),
        ({"warmup_epochs": 0.5}, "warmup_epochs=0.5"),
        ({"epochs": 3, "warmup_epochs": 3}, "leaves none"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        make_trainer().fit(**options)


def test_loaders_that_cannot_work_are_refused():
    stn = make_trainer().stn
    with pytest.raises(InputError, match="same loader"):
        BilevelTrainer(stn, train=TRAIN, valid=TRAIN)
    with pytest.raises(InputError, match="iterator"):
        BilevelTrainer(stn, train=iter(TRAIN), valid=VALID)
    with pytest.raises(InputError, match="training loader is empty"):
        BilevelTrainer(stn, train=[], valid=VALID).fit(5)
    with pytest.raises(InputError, match="validation loader is empty"):
        BilevelTrainer(stn, train=TRAIN, valid=[]).fit(5)
    with pytest.raises(InputError, match="empty"):
        evaluate(stn, nn.functional.cross_entropy, [])


def test_an_algorithm_beside_its_options_or_of_another_model_is_refused():
    with pytest.raises(InputError, match="entropy_weight"):
        make_trainer(DeltaSTN, entropy_weight=0.1)
    with pytest.raises(InputError, match="another"):
        BilevelTrainer(make_trainer().stn, train=TRAIN, valid=VALID, algorithm=DeltaSTN(make_trainer().stn))


def rates(trainer):
    return {role: optimizer.param_groups[0]["lr"] for role, optimizer in trainer.algorithm.optimizers.items()}


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def epoch_ended(self, trainer, record, result):
        self.seen.append(rates(trainer))


def test_a_cosine_schedule_takes_all_but_the_response_to_rest():
    trainer, observer = make_trainer(), Rates()
    before = rates(trainer)
    trainer.fit(4, warmup_epochs=1, callbacks=[LearningRateSchedule(), observer])
    for role in ("base", "hyper", "scale"):
        expected = [before[role] * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in (1, 2, 3, 4)]
        assert [each[role] for each in observer.seen] == pytest.approx(expected, abs=1e-12)
    assert all(each["response"] == before["response"] for each in observer.seen)


def test_a_schedule_of_ones_own_and_no_followers():
    trainer = make_trainer()
    before = rates(trainer)
    halving = LearningRateSchedule(lambda optimizer, steps: StepLR(optimizer, steps // 2, 0.5), followers=())
    observer = Rates()
    trainer.fit(2, warmup_epochs=1, callbacks=[halving, observer])
    assert observer.seen[-1] == before | {"base": pytest.approx(before["base"] / 4)}


def test_a_baseline_follows_the_same_schedule():
    trainer, observer = make_trainer(FixedHyperparameters), Rates()
    trainer.fit(2, callbacks=[LearningRateSchedule(), observer])
    assert observer.seen[-1] == {"base": pytest.approx(0, abs=1e-12)}


def test_another_fit_begins_its_schedule_anew():
    trainer, observers = make_trainer(), [Rates(), Rates()]
    before = rates(trainer)
    for observer in observers:
        trainer.fit(3, warmup_epochs=1, callbacks=[LearningRateSchedule(), observer])
        assert rates(trainer) == before
    assert observers[0].seen == observers[1].seen


def test_a_scheduler_that_follows_a_loss_is_refused():
    plateau = LearningRateSchedule(lambda optimizer, steps: ReduceLROnPlateau(optimizer))
    with pytest.raises(InputError, match="ReduceLROnPlateau follows a loss"):
        make_trainer().fit(2, callbacks=[plateau])


class Held(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return VALID[0][0][index % 16], VALID[0][1][index % 16]


class Watch(Callback):
    """First example of every validation batch that outer steps saw, without looking into the trainer."""

    def __init__(self, trainer):
        self.seen = []
        step = trainer.algorithm.outer_step

        def watched(content):
            self.seen.append(content[0][0].tolist())
            return step(content)

        trainer.algorithm.outer_step = watched


@pytest.mark.parametrize("persistent", [False, True])
def test_evaluation_does_not_disturb_the_pass_of_the_outer_steps(persistent):
    """With persistent workers a DataLoader has one iterator, which evaluation would begin anew."""
    trainer = make_trainer()
    trainer.valid = DataLoader(Held(), 2, num_workers=1, persistent_workers=persistent)
    watch = Watch(trainer)
    trainer.fit(6, warmup_epochs=0, train_steps=2, measure_trust=False)
    first = [Held()[index][0].tolist() for index in range(0, 20, 2)]
    assert watch.seen == [first[step % 10] for step in range(12)]


def test_evaluations_draw_nothing_from_the_run():
    class Evaluates(Callback):
        def inner_step_ended(self, trainer, epoch, record):
            trainer.evaluate(trainer.valid)

    results = []
    for callbacks in ([], [Evaluates()], [WeightAverage(0.9)]):
        trainer = make_trainer()
        trainer.valid = DataLoader(TensorDataset(*VALID[0]), 4, shuffle=True)
        torch.manual_seed(1)
        results.append(trainer.fit(3, warmup_epochs=1, train_steps=1, callbacks=callbacks).schedule)
    assert results[0] == results[1] == results[2]


def test_the_first_pass_is_that_of_a_plain_loop():
    trainer, seen = make_trainer(), []
    trainer.train = DataLoader(TensorDataset(*TRAIN[0]), 4, shuffle=True)
    torch.manual_seed(2)
    expected = [x.tolist() for x, _ in trainer.train]
    step = trainer.algorithm.inner_step
    trainer.algorithm.inner_step = lambda content: (seen.append(content[0].tolist()), step(content))[1]
    torch.manual_seed(2)
    trainer.fit(1, warmup_epochs=0, train_steps=1)
    assert seen == expected


def test_a_callback_that_fails_at_the_end_hides_neither_the_error_nor_the_others():
    ended = []

    class Fails(Callback):
        def epoch_ended(self, trainer, record, result):
            raise ZeroDivisionError

        def fit_ended(self, trainer, result):
            raise OSError("disk full")

    class Ends(Callback):
        def fit_ended(self, trainer, result):
            ended.append(result)

    with pytest.raises(OSError, match="disk full") as error:
        make_trainer().fit(2, callbacks=[Ends(), Fails(), Ends()])
    assert isinstance(error.value.__context__, ZeroDivisionError)
    assert len(ended) == 2


def test_a_schedule_needs_the_number_of_batches():
    class Endless:
        def __iter__(self):
            return iter(TRAIN)

    trainer = make_trainer()
    trainer.train = Endless()
    with pytest.raises(InputError, match="has no length"):
        trainer.fit(4, callbacks=[LearningRateSchedule()])


@pytest.mark.parametrize(("epochs", "expected"), [(1, 0), (2, 1), (9, 3), (30, 12)])
def test_warm_up_is_two_fifths_of_the_epochs(epochs, expected):
    result = make_trainer().fit(epochs, train_steps=1)
    first = next((point.epoch for point in result.schedule if point.outer_step), None)
    assert first == expected + 1


class NotFinite(Callback):
    """Makes the training batches from one step on not finite."""

    def __init__(self, first, last):
        self.first, self.last = first, last

    def fit_started(self, trainer, epochs, result):
        trainer.train = [(x.clone(), y) for x, y in TRAIN]
        self.clean = [x.clone() for x, _ in TRAIN]

    def safe_point(self, trainer, point):
        bad = self.first <= point.inner_step + 1 <= self.last
        for (x, _), clean in zip(trainer.train, self.clean, strict=True):
            x.copy_(clean * float("nan") if bad else clean)


def fit_with_bad_batches(first, last, *callbacks, **options):
    trainer = make_trainer(updates=UpdateOptions(**options))
    bad = NotFinite(first, last)
    bad.fit_started(trainer, 0, None)
    bad.fit_started = lambda *arguments: None
    return trainer, lambda: trainer.fit(3, warmup_epochs=1, callbacks=[bad, *callbacks])


def test_updates_that_are_not_finite_are_skipped_and_counted():
    trainer, fit = fit_with_bad_batches(5, 6)
    result = fit()
    assert [record.skipped for record in result.history] == [0, 3, 0]  # the base in two steps, the response in one
    assert result.skipped == 3
    assert all(math.isfinite(record.train_loss) for record in result.history)
    assert all(parameter.isfinite().all() for parameter in trainer.stn.parameters())


def test_repeated_ones_stop_the_run_and_the_last_good_checkpoint_stays(tmp_path):
    _, fit = fit_with_bad_batches(6, 99, Checkpoint(tmp_path, every_steps=1), skip_limit=3)
    with pytest.raises(DivergedError, match="4 in a row") as error:
        fit()
    for expected in (
        "The last batch holds numbers that are not finite",
        "Weights that are not finite: none",
        "base 0.01",
    ):
        assert expected in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir())[-1] == "step-0000000005.pt"


def test_accumulated_gradients_survive_a_checkpoint(tmp_path):
    class Stop(Callback):
        def safe_point(self, trainer, point):
            if point.inner_step == 5:
                raise ZeroDivisionError

    def trainer():
        return make_trainer(updates=UpdateOptions(accumulate=2))

    whole, resumed = trainer(), trainer()
    schedule = LearningRateSchedule
    expected = whole.fit(4, train_steps=1, callbacks=[schedule()])
    assert expected.history[-1].outer_step == 6
    with pytest.raises(ZeroDivisionError):
        trainer().fit(4, train_steps=1, callbacks=[schedule(), Checkpoint(tmp_path, every_steps=1), Stop()])
    result = resumed.fit(4, train_steps=1, callbacks=[schedule()], resume_from=tmp_path)
    assert result.schedule == expected.schedule
    assert torch.equal(resumed.stn.model.weight, whole.stn.model.weight)


def test_an_epoch_whose_validation_loss_is_not_finite_is_never_the_best():
    def record(epoch, loss):
        return EpochRecord(epoch, 1, 0, 1.0, None, loss, None, 0.0)

    history = [record(1, math.nan), record(2, 0.5), record(3, math.nan)]
    trainer, keep = make_trainer(), KeepBest()
    for each in history:
        keep.epoch_ended(trainer, each, None)
    assert FitResult(history=history).best.epoch == keep.record.epoch == 2
