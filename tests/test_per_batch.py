"""Hyperparameters of the user's own with one value per batch."""

import pytest
import torch
from retraining import compare
from test_every_entry_matters import on_features
from torch import nn

import stn_fx
from stn_fx.augment import Draws
from stn_fx.bilevel import STN, BilevelTrainer, GlobalSampling, PerBatch, PerExample, PerGroup, WithoutLinearization
from stn_fx.bilevel.replicas import Rows
from stn_fx.compiler.emit import source
from stn_fx.errors import InputError
from stn_fx.verify.subject import randomise_response

SEEN = []


def noisy(x, value, draws):
    SEEN.append(value.shape)
    return x + value * draws.normal(x.shape, x, "noise")


def scaled(x, value, draws):
    SEEN.append(value.shape)
    return x * (1 + value)


def squares(output, target, value):
    SEEN.append(value.shape)
    return value * output.square().mean(1)


HPARAMS = [
    stn_fx.CustomHyperparameter("noisy", noisy, "input", initial=0.3, per_batch=True),
    stn_fx.CustomHyperparameter("scaled", scaled, "activation", at="0", initial=0.2, per_batch=True),
    stn_fx.CustomHyperparameter("squares", squares, "loss", initial=0.1, per_batch=True),
    "dropout@1",
]
X, Y = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3


def wrapped(hparams=HPARAMS):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    stn = stn_fx.transform(model, hparams, (X,), seed=0).train()
    randomise_response(stn, torch.Generator().manual_seed(1))
    return stn


@pytest.mark.parametrize("sampling", [PerExample(), PerGroup(1), GlobalSampling(0.7), PerBatch()])
def test_inner_steps_draw_once_for_all_processes_and_outer_steps_for_each_example(sampling):
    space = wrapped().hparams
    own = [name in ("noisy", "scaled.0", "squares") for name in space.names]
    assert space.per_batch == [i for i, each in enumerate(own) if each]

    def drawn(method, start, stop):
        return method(space, Rows(start, stop, 8, 2), torch.Generator().manual_seed(5)).detach()

    whole = drawn(sampling.inner, 0, 8)
    assert torch.equal(torch.cat([drawn(sampling.inner, 0, 3), drawn(sampling.inner, 3, 8)]), whole)
    varies = [len(column.unique()) == 8 for column in whole.T]
    assert varies == [not each and not isinstance(sampling, PerBatch) for each in own]
    assert (whole[0] != space.raw).all()
    if isinstance(sampling, PerExample):
        assert all(len(column.unique()) == 8 for column in drawn(sampling.outer, 0, 8).T)


@pytest.mark.parametrize("algorithm", [None, WithoutLinearization(), STN])
def test_the_function_receives_a_scalar_in_every_pass(algorithm):
    stn = wrapped()
    steps = STN(stn) if algorithm is STN else stn_fx.DeltaSTN(stn, response_step=algorithm)
    before = stn.hparams.raw.detach().clone()
    SEEN.clear()
    for _ in range(3):
        assert not steps.inner_step((X, Y)).skipped
        steps.outer_step((X, Y))
    assert len(SEEN) >= 9
    assert set(SEEN) == {torch.Size([])}
    assert (stn.hparams.raw != before).all()
    assert stn_fx.check(stn, X).passed


def test_the_tangent_is_exact():
    stn = wrapped(HPARAMS[1:2])
    raw = stn.hparams.raw.detach() + 0.4
    primal, tangent = stn.linearize(X, raw=raw.expand(6, -1))
    model, factor = stn.model, 1 + stn.hparams.constrain(raw)[0]

    def plain(weights):
        first = X @ weights["0.weight"].t() + weights["0.bias"]
        return (first * factor).tanh() @ weights["2.weight"].t() + weights["2.bias"]

    weights = {name: p.detach() for name, p in model.named_parameters()}
    expected = torch.func.jvp(plain, (weights,), (stn.weight_response(raw - stn.hparams.raw.detach()),))
    torch.testing.assert_close((primal, tangent), expected)


def test_rows_that_differ_are_refused_where_it_acts():
    stn = wrapped()
    raw = stn.hparams.raw.detach().expand(6, -1) + torch.randn(6, 4, dtype=torch.float64)
    for run in (stn.linearize, stn.respond_in_training):
        with pytest.raises(InputError, match=r"one value for all examples of a batch.*the same number in every row"):
            run(X, raw=raw)
    assert stn.respond(X, raw=raw).shape == (6, 3)
    raw[:, stn.hparams.per_batch] = raw[:1, stn.hparams.per_batch]
    assert stn.linearize(X, raw=raw)[0].shape == (6, 3)


def test_emitted_code_says_that_there_is_one_value():
    stn = wrapped(HPARAMS[:1])
    code = source(stn.compiled, stn, "emitted")
    assert "'per_batch': True" in code
    namespace = {"__name__": "emitted", "__file__": "emitted.py"}
    exec(code, namespace)
    stn.generator().manual_seed(3)
    values = stn.hparams.constrain(stn.hparams.raw.detach()).expand(6, -1)
    state = dict(stn.model.state_dict())
    outputs = namespace["base"](state, {}, values, None, Draws(torch.Generator().manual_seed(3)), X)
    torch.testing.assert_close(outputs[0], stn(X))


def test_the_response_predicts_what_retraining_gives():
    noise = stn_fx.CustomHyperparameter("noisy", noisy, "input", initial=0.4, per_batch=True)
    (found,) = compare(on_features([noise], copies=60, repetitions=4))
    assert abs(found.retrained) > 2 * found.error
    assert 0.5 < found.predicted / found.retrained < 2, str(found)


@pytest.mark.parametrize("hparams", [HPARAMS, HPARAMS[:3]])
def test_a_run_measures_trust_in_the_others(hparams):
    stn = wrapped(hparams)
    trainer = BilevelTrainer(stn, train=[(X, Y)] * 3, valid=[(X + 1, Y)])
    trust = trainer.fit(2, warmup_epochs=1, train_steps=1).history[-1].trust
    measured = {name for name, each in trust.items() if each.promised is not None}
    assert measured == {name for name in stn.hparams.names if name.startswith("dropout")}
    assert all(each.hypergradient is not None for each in trust.values())
