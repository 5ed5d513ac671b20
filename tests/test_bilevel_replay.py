import json
import re

import pytest
import torch
from bilevel_fake import FakeSelfTuningModule, classification_batches
from torch import nn

import stn_fx
from stn_fx.bilevel import (
    BilevelTrainer,
    Callback,
    FixedHyperparameters,
    FollowSchedule,
    RunFolder,
    SchedulePoint,
    read_run,
    replay,
)
from stn_fx.bilevel.html_report import html_report, trust_notes
from stn_fx.errors import InputError, StnError

TRAIN, VALID = classification_batches(0), classification_batches(1)


def make_trainer(algorithm=None, hparams="weight_decay,label_smoothing"):
    torch.manual_seed(0)
    stn = FakeSelfTuningModule(nn.Linear(8, 3, dtype=torch.float64), hparams)
    return BilevelTrainer(stn, train=TRAIN, valid=VALID, algorithm=algorithm and algorithm(stn))


@pytest.fixture
def run(tmp_path):
    make_trainer().fit(4, warmup_epochs=1, train_steps=2, callbacks=[RunFolder(tmp_path / "run")])
    return tmp_path / "run"


def test_a_run_reads_back(run):
    recorded = read_run(run)
    expected = make_trainer().fit(4, warmup_epochs=1, train_steps=2)
    assert recorded.result.schedule == expected.schedule
    assert [each.valid_loss for each in recorded.result.history] == [each.valid_loss for each in expected.history]


def test_the_base_weights_of_a_tuned_run_are_those_of_plain_training_along_its_schedule(run):
    """Delta-STN's base update sees nothing of the response, so the replay must give the same weights."""
    tuned, replayed = make_trainer(), make_trainer().stn
    tuned.fit(4, warmup_epochs=1, train_steps=2)
    before = replayed.G.detach().clone()
    replay(replayed, read_run(run).result.schedule, 4, train=TRAIN, valid=VALID)
    torch.testing.assert_close(replayed.model.weight, tuned.stn.model.weight, rtol=1e-9, atol=1e-12)
    assert replayed.hparams.values() == pytest.approx(tuned.stn.hparams.values())
    assert torch.equal(replayed.G, before)


@pytest.fixture
def wrapped():
    def make(response="rowwise"):
        torch.manual_seed(0)
        layers = [nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 3)]
        model = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        return stn_fx.transform(
            nn.Sequential(model, *layers), "dropout,weight_decay", (torch.randn(4, 8),), response=response, seed=0
        )

    return make


def test_a_model_without_a_response_trains_as_one_with_a_response_does(wrapped):
    batches = [[(x.float(), y) for x, y in each] for each in (TRAIN, VALID)]
    plain = wrapped(None)
    point = SchedulePoint(0, 0, 0, wrapped().hparams.values(), {})
    result = replay(plain, [point], 1, train=batches[0], valid=batches[1])
    fixed = BilevelTrainer(
        again := wrapped(), train=batches[0], valid=batches[1], algorithm=FixedHyperparameters(again)
    ).fit(1)
    assert result.history[0].valid_loss == pytest.approx(fixed.history[0].valid_loss, rel=1e-5)
    assert not list(plain.response_parameters())
    assert "no response was asked for" in str(plain.report)
    assert "nothing responds" in str(plain.report)


def test_what_needs_a_response_says_so_where_there_is_none(wrapped):
    stn, x = wrapped(None), torch.randn(4, 8)
    for call in (lambda: stn.linearize(x), lambda: stn.respond(x), lambda: stn_fx.check(stn, (x,))):
        with pytest.raises(StnError, match="response=None"):
            call()
    with pytest.raises(InputError, match="leave response=None to runs that do not tune"):
        stn_fx.DeltaSTN(stn)


def test_a_schedule_whose_end_is_not_reached_is_told(run):
    with pytest.warns(UserWarning, match="goes on to inner step 16, and this run ends after 8"):
        replay(make_trainer().stn, read_run(run).result.schedule, 2, train=TRAIN, valid=VALID)


def test_values_at_a_bound_are_followed(run):
    class AtBound(Callback):
        def epoch_ended(self, trainer, record, result):
            assert result.values["weight_decay"] == pytest.approx(1.0, abs=1e-5)

    point = read_run(run).result.schedule[-1]
    point.values["weight_decay"] = 1.0
    make_trainer(FixedHyperparameters).fit(1, callbacks=[FollowSchedule([point]), AtBound()])


def test_values_close_to_a_bound_and_without_one_are_followed_exactly(run):
    point = read_run(run).result.schedule[-1]
    point.values["weight_decay"] = 1e-7
    trainer = make_trainer(FixedHyperparameters, "weight_decay(high=inf),label_smoothing")
    trainer.fit(1, callbacks=[FollowSchedule([point])])
    assert trainer.stn.hparams.values() == pytest.approx(point.values, rel=1e-6)


def test_perturbed_values_lie_around_those_of_the_schedule(run):
    class Raw(Callback):
        def __init__(self):
            self.seen = []

        def inner_step_ended(self, trainer, epoch, record):
            self.seen.append(trainer.stn.hparams.raw.detach().clone())

    point, found = read_run(run).result.schedule[-1], []
    for seed in (0, 0, 1):
        trainer, raw = make_trainer(FixedHyperparameters), Raw()
        trainer.fit(100, callbacks=[FollowSchedule([point], perturbed=True, seed=seed), raw])
        found.append(torch.stack(raw.seen))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    space = make_trainer(FixedHyperparameters).stn.hparams
    space.set_values(point.values)
    scale_H = torch.tensor([point.scales[name] for name in space.names], dtype=torch.float64)
    z_H = (found[0].mean(0) - space.raw.detach()) / (scale_H / 400**0.5)
    assert z_H.abs().max() < 4
    torch.testing.assert_close(found[0].std(0), scale_H, rtol=0.2, atol=0)


def test_a_schedule_that_does_not_fit_is_refused(run):
    schedule = read_run(run).result.schedule
    with pytest.raises(InputError, match="no point"):
        FollowSchedule([])
    with pytest.raises(InputError, match="this algorithm tunes"):
        make_trainer().fit(2, callbacks=[FollowSchedule(schedule)])
    with pytest.raises(InputError, match="only in it: label_smoothing"):
        make_trainer(FixedHyperparameters, "weight_decay").fit(2, callbacks=[FollowSchedule(schedule)])


def test_the_report_is_one_page_that_needs_no_network(run):
    page = html_report(read_run(run))
    assert "data:image/png;base64," in page
    assert not re.search(r"https?://|<script|<link", page)
    for expected in ("weight_decay", "label_smoothing", "How far to trust it", "Lowest validation loss"):
        assert expected in page


def test_the_report_says_what_speaks_against_a_result(run):
    recorded = read_run(run)
    recorded.result.schedule[-1].values["weight_decay"] = 0.999
    recorded.result.schedule[-1].values["label_smoothing"] = 1e-6
    recorded.result.schedule[-1].scales["label_smoothing"] = 0.01
    recorded.result.interrupted = True
    text = " ".join(trust_notes(recorded))
    at_bounds = ("weight_decay is at its upper bound", "label_smoothing is at its lower bound")
    for expected in (*at_bounds, "Scales below 0.05: label_smoothing", "interrupted"):
        assert expected in text


def test_a_folder_without_a_run_is_refused(run, tmp_path):
    with pytest.raises(InputError, match=r"holds no run .*values\.json"):
        read_run(tmp_path)
    (run / "history.json").write_text("[]")
    with pytest.raises(InputError, match="No epoch"):
        html_report(read_run(run))
    (run / "values.json").write_text(json.dumps({}))
    with pytest.raises(InputError, match="not of this version"):
        read_run(run)
