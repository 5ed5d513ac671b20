"""The trust that a run measures of itself: right on a problem known in closed form, and without a trace in the run."""

import csv
import json
import math
from dataclasses import replace

import pytest
import test_ridge as ridge
import torch
from bilevel_fake import FakeSelfTuningModule, classification_batches
from torch import nn

import stn_fx
from stn_fx.bilevel import (
    BilevelTrainer,
    Callback,
    DeltaSTN,
    EpochRecord,
    EveryKth,
    Linearized,
    RunFolder,
    Trust,
    read_run,
    verdicts,
)
from stn_fx.bilevel.html_report import html_report
from stn_fx.bilevel.plot import draw
from stn_fx.bilevel.records import FitResult, SchedulePoint
from stn_fx.bilevel.trust import pooled
from stn_fx.bilevel.trust_measurement import _seed, measure, measure_response

SCALE = 0.5


def best_ridge():
    """Wrapped model at the optimal weights, and the response that minimises the linearized objective, (O, D)."""
    stn = ridge.made(0.4, SCALE)
    with torch.no_grad():
        stn.model.weight.copy_(ridge.PROBLEM.optimum(0.4))
    first, second = ridge.moments(stn, SCALE)
    curvature = SCALE**2 * ridge.PROBLEM.A + second * torch.eye(ridge.D, dtype=torch.float64)
    return stn, -first * stn.model.weight.detach() @ torch.linalg.inv(curvature)


def excess(stn, M):
    """Linearized training objective of the response M, up to a constant, perturbations integrated exactly."""
    points, weights = ridge.quadrature(SCALE, 40)
    decay = stn.hparams.constrain(stn.hparams.raw.detach() + points.unsqueeze(1))[:, 0]
    total = 0.0
    for point, weight, value in zip(points, weights, decay, strict=True):
        W = stn.model.weight.detach() + point * M
        loss = ridge.per_example_loss(ridge.PROBLEM.x @ W.t(), ridge.PROBLEM.y).mean()
        total += float(weight * (loss + 0.5 * value * W.square().sum()))
    return total


def measured(stn, M, copies=512):
    response = stn.responses()["weight"]
    with torch.no_grad():
        response.V.fill_(1.0)
        response.U.copy_(M)
    batch = (ridge.PROBLEM.x.repeat(copies, 1), ridge.PROBLEM.y.repeat(copies, 1))
    valid = (ridge.PROBLEM.x_valid, ridge.PROBLEM.y_valid)
    return measure(DeltaSTN(stn, ridge.per_example_loss), batch, valid, 3)["weight_decay"]


def test_where_examples_are_fewer_than_hyperparameters_each_has_its_turn():
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Dropout(0.2), nn.Linear(4, 4))]
    x, y = torch.randn(8, 4), torch.arange(8) % 4
    stn = stn_fx.transform(nn.Sequential(*layers), "dropout,weight_decay", (x,), seed=0)
    steps = DeltaSTN(stn)
    steps.inner_step((x, y))
    seen = set()
    for step in range(60):
        found = measure_response(steps, (x, y), step)
        seen |= {name for name, each in found.items() if each["promised_error"] is not None}
    assert seen == set(stn.hparams.names)


def test_the_response_error_orders_responses_as_the_objective_does():
    stn, best = best_ridge()
    noise = torch.randn(best.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise *= best.norm() / noise.norm()
    responses = {
        "best": best, "half": 0.5 * best, "tenth": 0.1 * best, "none": 0 * best, "noisy": best + noise, "turned": -best
    }  # fmt: skip
    errors = {name: measured(stn, M).response_error for name, M in responses.items()}
    objectives = {name: excess(stn, M) for name, M in responses.items()}
    assert sorted(errors, key=errors.__getitem__) == sorted(objectives, key=objectives.__getitem__)
    assert errors["best"] < 0.1
    assert errors["none"] == 1


@pytest.mark.parametrize("multiple", [0.2, 0.5, 1.5, 2.0, -1.0])
def test_its_square_is_the_share_of_the_attainable_decrease_that_is_missed(multiple):
    stn, best = best_ridge()
    missed = (excess(stn, multiple * best) - excess(stn, best)) / (excess(stn, 0 * best) - excess(stn, best))
    assert measured(stn, multiple * best).response_error == pytest.approx(math.sqrt(missed), abs=0.05)


def test_terms_on_activations_count():
    """Everything is quadratic here, so that what is delivered is the decrease itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1)).double()
    x, y = torch.randn(64, 4).double(), torch.randn(64, 1).double()
    stn = stn_fx.transform(model, "activation_regularization@0(initial=0.5)", (x,), seed=0).train()
    with torch.no_grad():
        for parameter in stn.response_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    steps = DeltaSTN(stn, lambda output, target: (output - target).square().mean(1))
    (found,) = measure_response(steps, (x, y), 3).values()
    noise_B = torch.randn(64, generator=torch.Generator().manual_seed(_seed(steps, 3)), dtype=torch.float64)
    decrease_B = torch.zeros(64, dtype=torch.float64)
    for sign in (1, -1):
        raw_BH = stn.hparams.raw.detach() + (sign * stn.hparams.scales().detach() * noise_B)[:, None]
        strength_B = stn.hparams.constrain(raw_BH)[:, 0]
        passed = stn.linearize_with_activations(x, raw=raw_BH)
        for a in (0.0, 1.0):
            output, activation = (
                passed.primal + a * passed.tangent,
                passed.activations[0] + a * passed.activation_tangents[0],
            )
            loss_B = (output - y).square().mean(1) + strength_B * activation.square().mean(1)
            decrease_B += (0.5 - a) * loss_B.detach()
    assert found["delivered"] == pytest.approx(decrease_B.mean().item(), rel=1e-9)


def test_the_learned_response_becomes_better_and_says_so():
    stn = ridge.made(0.4, SCALE)
    rates = {
        "base_optimizer": lambda p: torch.optim.SGD(p, 0.1),
        "response_optimizer": lambda p: torch.optim.SGD(p, 0.1),
    }
    steps = DeltaSTN(stn, ridge.per_example_loss, response_step=EveryKth(Linearized(), 2), **rates)
    batch = (ridge.PROBLEM.x.repeat(16, 1), ridge.PROBLEM.y.repeat(16, 1))
    errors = []
    for i in range(400):
        if i in (20, 399):
            errors.append(measure(steps, batch, None, i)["weight_decay"].response_error)
        steps.inner_step(batch)
    assert errors[1] < 0.3 < errors[0]


def test_the_hypergradient_is_that_of_the_response_pass():
    stn, best = best_ridge()
    found = measured(stn, best)
    raw = stn.hparams.raw.expand(400, -1)
    loss = ridge.per_example_loss(stn.respond(ridge.PROBLEM.x_valid, raw=raw), ridge.PROBLEM.y_valid).mean()
    (exact,) = torch.autograd.grad(loss, stn.hparams.raw)
    # At perturbed values, whose effect of second order is what is left over.
    assert abs(found.hypergradient - exact.item()) < 3 * found.hypergradient_error
    assert 0 < found.hypergradient_error < 0.1


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def trained(measure_trust, hparams="dropout,weight_decay,label_smoothing,mixup", callbacks=(), **options):
    torch.manual_seed(0)
    train, valid = ([(x.float(), y) for x, y in classification_batches(seed)] for seed in (0, 1))
    stn = stn_fx.transform(Net(), hparams, (train[0][0],), seed=0)
    trainer = BilevelTrainer(stn, train=train, valid=valid, **options)
    result = trainer.fit(4, warmup_epochs=1, train_steps=2, measure_trust=measure_trust, callbacks=callbacks)
    return stn, result


@pytest.mark.parametrize(
    "options", [{}, {"updates": stn_fx.bilevel.UpdateOptions(accumulate=2)}], ids=["", "accumulate"]
)
def test_the_run_is_the_same_to_the_last_bit_without_it(options):
    (with_it, told), (without, silent) = trained(True, **options), trained(False, **options)
    assert told.schedule == silent.schedule
    tensors = with_it.state_dict()
    assert all(torch.equal(tensors[name], value) for name, value in without.state_dict().items() if name in tensors
               and isinstance(value, torch.Tensor))  # fmt: skip
    assert [replace(each, trust=None, seconds=0) for each in told.history] == [
        replace(each, seconds=0) for each in silent.history
    ]
    assert all(each.trust is None for each in silent.history)
    assert torch.equal(with_it.generator().get_state(), without.generator().get_state())
    names = set(told.values)
    for record in told.history:
        assert set(record.trust) == names
        assert all(each.response_error is not None for each in record.trust.values())
        assert all((each.hypergradient is None) == (record.outer_step == 0) for each in record.trust.values())
    assert trained(True, **options)[1].history[-1].trust == told.history[-1].trust


def test_bounds_and_collapsed_scales_are_found():
    stn, _ = trained(False, hparams="dropout,weight_decay")
    algorithm = DeltaSTN(stn)
    assert {each.bound for each in measure(algorithm, None, None, 0).values()} == {None}
    with torch.no_grad():
        stn.hparams.raw[0], stn.hparams.raw[1] = 9.0, -30.0
        stn.hparams.raw_scale[1] = -6.0
    found = measure(algorithm, None, None, 0)
    assert (found["dropout.3"].bound, found["dropout.3"].collapsed) == ("upper", False)
    assert (found["weight_decay"].bound, found["weight_decay"].collapsed) == ("lower", True)


def test_an_output_without_examples_along_its_first_axis_is_left_out():
    class Turned(Net):
        def forward(self, x):
            return super().forward(x).t()

    def loss(output, target):
        return nn.functional.cross_entropy(output.t(), target)

    torch.manual_seed(0)
    x, y = classification_batches(0)[0]
    stn = stn_fx.transform(Turned(), "weight_decay", (x.float(),), seed=0)
    found = measure(DeltaSTN(stn, loss), (x.float(), y), (x.float(), y), 0)["weight_decay"]
    assert found.response_error is None
    assert found.hypergradient is not None


def test_a_sequence_first_output_as_long_as_its_batch_is_left_out():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(8, 8, 4), torch.randint(0, 3, (8, 8))
    stn = stn_fx.transform(model, "weight_decay", (x,), batch_axis=1)

    def loss(output, target):
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())

    assert measure(DeltaSTN(stn, loss), (x, y), (x, y), 0)["weight_decay"].response_error is None


def test_it_is_in_the_files_the_picture_and_the_page(tmp_path, monkeypatch):
    _, result = trained(True, callbacks=[RunFolder(tmp_path)])
    recorded = read_run(tmp_path)
    assert recorded.result.history == result.history
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = result.history[-1].trust["weight_decay"]
    assert float(rows[-1]["weight_decay response error"]) == last.response_error
    assert float(rows[-1]["weight_decay hypergradient signal"]) == last.hypergradient_signal
    assert rows[0]["weight_decay hypergradient"] == ""
    labels = [axes.get_ylabel() for axes in draw(result, recorded.specs).axes]
    assert labels[-2:] == ["scale (raw space)", "response error"]
    page = html_report(recorded)
    assert "trust it?" in page
    assert all(each.name in page and each.words.split(".")[0][:20] in page for each in verdicts(result))
    assert not all(each.trusted for each in verdicts(result))
    monkeypatch.setattr("stn_fx.bilevel.html_report.trust_notes", lambda run: [])
    assert "Nothing was found that speaks against it" not in html_report(recorded)
    assert FitResult.from_json(result.to_json()).history == result.history


def test_older_runs_without_it_are_read(tmp_path):
    _, result = trained(True, callbacks=[RunFolder(tmp_path)])
    history = json.loads((tmp_path / "history.json").read_text())
    for record in history:
        del record["trust"]
    (tmp_path / "history.json").write_text(json.dumps(history))
    recorded = read_run(tmp_path)
    assert recorded.result.history[0].trust is None
    assert "trust it?" not in html_report(recorded)
    assert len(draw(recorded.result, recorded.specs).axes) == len(draw(result, recorded.specs).axes) - 1


GOOD = Trust(1.0, 0.1, 0.9, 0.1, 0.0, 1.0)
EARLY = replace(GOOD, hypergradient=5.0)


def recorded(trusts) -> FitResult:
    """A run of one hyperparameter with these measurements."""
    history = [EpochRecord(i, i, i, 1.0, 1.0, 1.0, None, 0.0, 0, {"x": t}) for i, t in enumerate(trusts)]
    return FitResult([SchedulePoint(6, 6, 6, {"x": 0.1}, {"x": 0.01})], history)


def test_noise_that_stands_out_in_one_of_many_epochs_is_no_sign() -> None:
    """Of sixty epochs of noise three are beyond two standard errors; of one epoch, such a one is a sign."""
    once = replace(GOOD, hypergradient=2.5, hypergradient_error=1.0)
    for epochs, words in ((1, "Nothing speaks against it"), (60, "never stood out")):
        quiet = [replace(GOOD, hypergradient=0.1 * (-1) ** e, hypergradient_error=1.0) for e in range(epochs - 1)]
        (verdict,) = verdicts(recorded([once, *quiet, GOOD]))
        assert words in verdict.words, epochs


@pytest.mark.parametrize(
    ("last", "early", "words"),
    [
        (GOOD, EARLY, "Nothing speaks against it"),
        (replace(GOOD, collapsed=True), EARLY, "scale fell"),
        (replace(GOOD, bound="upper"), EARLY, "upper bound"),
        (replace(GOOD, bound="lower"), EARLY, "lower bound"),
        (replace(GOOD, promised_error=2.0), EARLY, "cannot be told from noise"),
        (replace(GOOD, promised=-1.0), EARLY, "uphill"),
        (replace(GOOD, delivered=1.8), EARLY, "too short still"),
        (replace(GOOD, delivered=-0.3), EARLY, "worse than none"),
        (replace(GOOD, delivered=0.1), EARLY, "too long or noisy"),
        (replace(GOOD, promised=None), EARLY, "could not be measured"),
        (GOOD, GOOD, "never stood out"),
        (replace(GOOD, hypergradient=4.0), EARLY, "still moving"),
    ],
)
def test_the_verdict_names_the_reason(last, early, words):
    (verdict,) = verdicts(recorded([early] * 4 + [last] * 2))
    assert words in verdict.words
    assert verdict.trusted == (words == "Nothing speaks against it")


def test_pooling_halves_the_error_of_four_epochs():
    assert pooled([GOOD] * 4).promised_error == pytest.approx(0.05)
    assert pooled([GOOD] * 4).promised == 1.0


class Kill(Callback):
    def epoch_ended(self, trainer, record, result):
        if record.epoch == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("every", [1, 3, 4])
def test_a_resumed_run_measures_the_same(tmp_path, every):
    """`every` steps of 4 in an epoch: also right after the last step of an epoch, before it is measured."""
    from stn_fx.bilevel import Checkpoint

    whole = fake_trainer().fit(4, warmup_epochs=1, train_steps=2)
    with pytest.raises(KeyboardInterrupt):
        fake_trainer().fit(
            4, warmup_epochs=1, train_steps=2, callbacks=[Checkpoint(tmp_path, every_steps=every), Kill()]
        )
    resumed = fake_trainer().fit(
        4, warmup_epochs=1, train_steps=2, callbacks=[Checkpoint(tmp_path)], resume_from=tmp_path
    )
    assert [each.trust for each in resumed.history] == [each.trust for each in whole.history]


def fake_trainer():
    torch.manual_seed(0)
    stn = FakeSelfTuningModule(nn.Linear(8, 3, dtype=torch.float64), "weight_decay,label_smoothing")
    return BilevelTrainer(stn, train=classification_batches(0), valid=classification_batches(1, examples=40))
