"""Activation regularization and its temporal form: terms of the training loss on outputs of named modules."""

import importlib.util
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import jvp

import stn_fx
from stn_fx.augment import Draws
from stn_fx.bilevel import STN, Linearized, OnFraction, WithoutLinearization
from stn_fx.bilevel.algorithm import training_mode
from stn_fx.bilevel.apply import Updater
from stn_fx.bilevel.objective import as_objective
from stn_fx.bilevel.updates import base_update, named_values, perturbed_response_loss, response_update
from stn_fx.compiler.emit import emit
from stn_fx.errors import BatchLayoutError, InputError, UnknownHyperparameterError
from stn_fx.rules.activation_terms import mean_square, mean_square_change
from stn_fx.verify.subject import randomise_response

B, T, WORDS, CELLS = 4, 5, 7, 3
BOTH = "activation_regularization@net, temporal_activation_regularization@net"


class Words(nn.Module):
    """Scores (B, WORDS) of token sequences: (B, T), or (T, B) where the network is sequence-first."""

    def __init__(self, kind="LSTM", batch_first=True, last_state=False):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 4)
        self.net = getattr(nn, kind)(4, CELLS, batch_first=batch_first)
        self.decode = nn.Linear(CELLS, WORDS)
        self.time, self.last_state = 1 if batch_first else 0, last_state

    def forward(self, tokens):
        output, state = self.net(self.embed(tokens))
        if self.last_state:
            return self.decode((state[0] if isinstance(state, tuple) else state)[-1])
        return self.decode(output.mean(self.time))


def stepped(model, weights, tokens):
    """(scores, activations (B, T, CELLS)) of a batch-first model, step by step, as torch documents its cells."""
    x = F.embedding(tokens if model.time == 1 else tokens.t(), weights["embed.weight"])
    w_ih, w_hh, b_ih, b_hh = (weights[f"net.{n}_l0"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h = c = x.new_zeros(len(x), CELLS)
    outputs = []
    for t in range(x.shape[1]):
        from_x, from_h = x[:, t] @ w_ih.t() + b_ih, h @ w_hh.t() + b_hh
        if isinstance(model.net, nn.LSTM):
            i, f, g, o = (from_x + from_h).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            (r_x, z_x, n_x), (r_h, z_h, n_h) = from_x.chunk(3, -1), from_h.chunk(3, -1)
            z = (z_x + z_h).sigmoid()
            h = (1 - z) * (n_x + (r_x + r_h).sigmoid() * n_h).tanh() + z * h
        outputs.append(h)
    activation = torch.stack(outputs, 1)
    read = activation[:, -1] if model.last_state else activation.mean(1)
    return read @ weights["decode.weight"].t() + weights["decode.bias"], activation


def wrapped(model, hparams=BOTH, batch_axis=None, response="rowwise", example=None):
    stn = stn_fx.transform(
        model.double(), hparams, (tokens(model) if example is None else example,), batch_axis=batch_axis,
        response=response, seed=0,
    )  # fmt: skip
    randomise_response(stn, torch.Generator().manual_seed(1))
    return stn


def tokens(model, size=B):
    x = torch.randint(0, WORDS, (size, T), generator=torch.Generator().manual_seed(2))
    return x if model.time == 1 else x.t().contiguous()


def explicit_loss(scores, activation, targets, values):
    """The whole training loss, written out."""
    loss = F.cross_entropy(scores, targets)
    loss = loss + (values["activation_regularization.net"] * activation.square().mean((1, 2))).mean()
    change = (activation[:, 1:] - activation[:, :-1]).square().mean((1, 2))
    return loss + (values["temporal_activation_regularization.net"] * change).mean()


class Still(torch.optim.SGD):
    """Leaves parameters and gradients as they are."""

    def step(self, closure=None):
        pass


def gradients_of(update, stn, parameters, batch, *perturbed):
    """Loss and gradients of one update."""
    parameters = list(parameters)
    updater = Updater([Still(parameters, lr=0.0)], "tested")
    with training_mode(stn):
        outcome = update(stn, as_objective(F.cross_entropy), updater, batch, *perturbed, nullcontext())
    assert not outcome.skipped
    return outcome.loss, [p.grad for p in parameters]


def by_example(model, x):
    return [x[i : i + 1] if model.time == 1 else x[:, i : i + 1] for i in range(B)]


MODELS = [("LSTM", True, False), ("LSTM", True, True), ("GRU", False, False), ("GRU", True, True)]


@pytest.mark.parametrize("response", ["rowwise", stn_fx.LowRank(2)])
@pytest.mark.parametrize(("kind", "batch_first", "last_state"), MODELS)
def test_gradients_are_those_of_the_loss_written_out(kind, batch_first, last_state, response):
    torch.manual_seed(0)
    model = Words(kind, batch_first, last_state)
    stn = wrapped(model, batch_axis=0 if batch_first else 1, response=response)
    x, targets = tokens(model), torch.randint(0, WORDS, (B,), generator=torch.Generator().manual_seed(3))
    batch = as_objective(F.cross_entropy).batch((x, targets), torch.device("cpu"))
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def check(found, loss, parameters):
        value, gradients = found
        assert value == pytest.approx(loss.item(), rel=1e-12)
        torch.testing.assert_close(
            gradients, list(torch.autograd.grad(loss, list(parameters), retain_graph=True)), rtol=1e-9, atol=1e-14
        )

    values = named_values(stn, stn.hparams.raw.detach().expand(B, -1))
    loss = explicit_loss(*stepped(model, dict(model.named_parameters()), x), targets, values)
    check(gradients_of(base_update, stn, stn.base_parameters(), batch), loss, stn.base_parameters())

    raw_BH = stn.hparams.sample(B, torch.Generator().manual_seed(4)).detach()
    values = named_values(stn, raw_BH)
    linearized, perturbed = [], []
    for i, own in enumerate(by_example(model, x)):
        changes = stn.weight_response(raw_BH[i] - stn.hparams.raw.detach())
        changes = {name: changes.get(name, torch.zeros_like(w)) for name, w in weights.items()}
        primals, tangents = jvp(lambda w, own=own: stepped(model, w, own), (weights,), (changes,))
        linearized.append([p + t for p, t in zip(primals, tangents, strict=True)])
        perturbed.append(stepped(model, {name: w + changes[name] for name, w in weights.items()}, own))
    without_linearization = partial(response_update, response_loss=perturbed_response_loss)
    for update, rows in ((response_update, linearized), (without_linearization, perturbed)):
        scores, activation = (torch.cat(parts) for parts in zip(*rows, strict=True))
        loss = explicit_loss(scores, activation, targets, values)
        found = gradients_of(update, stn, stn.response_parameters(), batch, [raw_BH])
        check(found, loss, stn.response_parameters())


def test_what_users_see_stays_and_the_package_checks_it():
    model = Words()
    stn = wrapped(model, f"{BOTH}, dropout@embed")
    x = tokens(model)
    plain = wrapped(Words(), "dropout@embed")
    plain.model.load_state_dict(model.state_dict())
    for mode in (stn.train, stn.eval):
        mode()
        plain.train(stn.training)
        raw = stn.hparams.raw.detach().clone()
        with torch.no_grad():
            stn.hparams.raw.fill_(-50.0)
            plain.hparams.raw.fill_(-50.0)
            torch.testing.assert_close(stn(x), plain(x))
            primal, tangent = stn.linearize(x)
            assert primal.shape == tangent.shape == stn.respond(x).shape == (B, WORDS)
            stn.hparams.raw.copy_(raw)
    assert stn_fx.check(stn, x).passed
    assert stn.train().finalize() is model
    assert stn.finalized.without_place["activation_regularization.net"] == "it acts in the training loss"
    assert "activation_regularization.net" in str(stn.report)


def test_the_plain_term_sees_the_dropped_output_and_the_temporal_one_what_comes_before():
    model = Words()
    stn = wrapped(model, f"dropout@net(initial=0.6), {BOTH}").train()
    with stn.watching() as activations:
        stn(tokens(model))
    before, dropped = activations
    assert (dropped == 0).any()
    assert not (before == 0).any()
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], before[kept] / 0.4)


class Shared(nn.Module):
    """Calls one module twice; folds the batch with time on the way; images for another."""

    def __init__(self):
        super().__init__()
        self.layer, self.image = nn.Linear(3, 3), nn.Conv2d(1, 2, 3)
        self.folded, self.fixed = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("constant", torch.ones(2, 3))

    def forward(self, x, image):
        x = self.layer(self.layer(x).tanh())
        x = self.folded(x.reshape(-1, 3)).reshape(x.shape)
        return x.sum((1, 2)) + self.image(image).mean((1, 2, 3)) + self.fixed(self.constant).sum()


INPUTS = (torch.randn(B, T, 3, dtype=torch.float64), torch.randn(B, 1, 5, 5, dtype=torch.float64))


def transformed(hparams):
    return stn_fx.transform(Shared().double(), hparams, INPUTS, seed=0)


def test_every_call_counts_and_folded_axes_are_time():
    stn = transformed("activation_regularization@layer, temporal_activation_regularization@folded").train()
    assert stn.hparams.names == ("activation_regularization.layer", "temporal_activation_regularization.folded")
    with stn.watching() as activations:
        stn(*INPUTS)
    model = stn.model
    first = model.layer(INPUTS[0])
    second = model.layer(first.tanh())
    torch.testing.assert_close(activations, [first, second, model.folded(second)])


def test_the_terms_themselves():
    x = torch.randn(B, T, 3, dtype=torch.float64)
    torch.testing.assert_close(mean_square(x), torch.stack([each.pow(2).mean() for each in x]))
    expected = torch.stack([(each[1:] - each[:-1]).pow(2).mean() for each in x])
    torch.testing.assert_close(mean_square_change(x), expected)
    assert torch.equal(mean_square_change(x[:, :1]), torch.zeros(B, dtype=torch.float64))


@pytest.mark.parametrize(
    ("hparams", "error", "message"),
    [
        ("activation_regularization", InputError, "name it, as in activation_regularization@layer"),
        ("activation_regularization@nowhere", UnknownHyperparameterError, "no module of that name"),
        ("activation_regularization@fixed", BatchLayoutError, "has no batch axis"),
        ("temporal_activation_regularization@image", InputError, "examples, time steps and features"),
    ],
)
def test_refusals(hparams, error, message):
    with pytest.raises(error, match=message):
        transformed(hparams)


def test_emitted_code_hands_the_activations_out(tmp_path):
    model = Words()
    stn = wrapped(model, "activation_regularization@net(shared)").train()
    emitted = emit(stn.compiled, stn, tmp_path / "words_stn.py")
    spec = importlib.util.spec_from_file_location("words_stn", emitted.module)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    term = {"term": "activation_regularization", "hyperparameter": "activation_regularization@net"}
    assert term == module.ACTIVATIONS[0]
    state, response, current = module.load()
    outputs = module.base(state, response, current.expand(B, -1), torch.zeros(B, len(current)), Draws(), tokens(model))
    with stn.watching() as activations:
        torch.testing.assert_close(outputs[0], stn(tokens(model)))
    torch.testing.assert_close(outputs[1:], activations)


@pytest.mark.parametrize("algorithm", [None, WithoutLinearization(), OnFraction(Linearized(), 0.5), STN])
def test_a_run_of_every_algorithm(algorithm):
    model = Words()
    stn = wrapped(model)
    steps = STN(stn) if algorithm is STN else stn_fx.DeltaSTN(stn, response_step=algorithm)
    before = stn.hparams.raw.detach().clone()
    batch = (tokens(model), torch.arange(B))
    for _ in range(3):
        assert not steps.inner_step(batch).skipped
        steps.outer_step(batch)
    assert (stn.hparams.raw != before).all()
