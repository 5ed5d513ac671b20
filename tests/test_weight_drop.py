"""DropConnect on hidden weights of recurrent networks, with a rate and a mask for each example."""

import pytest
import torch
from oracles import EVERY_ORACLE, Subject, assert_sites, conditioned_share
from test_recurrent import MODELS, RESPONSES, AwdLM, Tagger, tokens
from torch import nn
from torch.func import jvp

import stn_fx
from stn_fx.augment import Draws
from stn_fx.bilevel import STN, WithoutLinearization
from stn_fx.errors import UnknownHyperparameterError
from stn_fx.rules.recurrent_response import recurrent_response
from stn_fx.rules.weight_drop import dropped_layer, dropped_tangent, hidden_mask
from stn_fx.verify.subject import randomise_response

KINDS = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
T, N, F, H, P = 4, 3, 2, 5, 2


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("name", ["tied, state carried, sequence first", "AWD", "tagger"])
def test_models_against_the_oracles(name, response):
    subject = Subject(hparams="weight_drop,dropout", response=RESPONSES[response], **MODELS[name])
    assert conditioned_share(subject.stn) == 1.0
    for oracle in EVERY_ORACLE:
        for batch in (1, 2, 5):
            oracle(subject, batch)
    assert_sites(subject, 4)


def random_layer(kind, generator=0, projection=False):
    torch.manual_seed(generator)
    size, read = KINDS[kind] * H, P if projection else H
    weights = [torch.randn(shape, dtype=torch.float64) for shape in ((size, F), (size, read), (size,), (size,), (P, H))]
    weights[4] = weights[4] if projection else None
    cell = torch.randn(N, H, dtype=torch.float64) if kind == "lstm" else None
    return torch.randn(T, N, F, dtype=torch.float64), torch.randn(N, read, dtype=torch.float64), cell, tuple(weights)


CASES = [*((kind, reverse, False) for kind in KINDS for reverse in (False, True)), ("lstm", True, True)]


@pytest.mark.parametrize("structure", ["row-wise", "low-rank", "dense"])
@pytest.mark.parametrize(("kind", "reverse", "projection"), CASES)
def test_values_tangents_and_their_gradients_are_those_of_each_examples_own_layer(kind, reverse, projection, structure):
    x, hidden, cell, weights = random_layer(kind, projection=projection)
    mask = hidden_mask(weights[1], torch.tensor([0.0, 0.3, 0.7]), (0, 1, 1), draws(), "m")
    assert (mask[0] == 1).all()
    parts = [leaf(structure, weight) for weight in weights]
    changes = tuple(None if p is None else p[0] for p in parts)
    states = (x, hidden, cell)
    states_t = tuple(None if s is None else torch.randn_like(s) for s in states)

    def own(i, x, hidden, cell, *weights):
        """Torch's own equations for one example, at its masked weights."""
        w_ih, w_hh, *rest = weights
        none = (None,) * 5
        return recurrent_response(kind, reverse, x, hidden, cell, (w_ih, mask[i] * w_hh, *rest), none)

    values = dropped_layer(kind, reverse, x, hidden, cell, weights, changes, mask)
    tangents = dropped_tangent(kind, reverse, states, states_t, weights, changes, mask)
    expected_values, expected_tangents = [], []
    for i in range(N):
        state = [None if s is None else s[:, i : i + 1] if s.ndim == 3 else s[i : i + 1] for s in states]
        state_t = [None if s is None else s[:, i : i + 1] if s.ndim == 3 else s[i : i + 1] for s in states_t]
        dense = [None if p is None else p[1](i) for p in parts]
        moved = [w if d is None else w + d for w, d in zip(weights, dense, strict=True)]
        expected_values.append(own(i, *state, *moved))
        given = [v for v in (*state, *weights) if v is not None]
        along = tuple(v for v in (*state_t, *dense) if v is not None)

        def function(*values, i=i, state=state):
            values = iter(values)
            filled = [None if v is None else next(values) for v in (*state, *weights)]
            return own(i, *filled)

        expected_tangents.append(jvp(function, tuple(given), along)[1])
    leaves = [tensor for p in parts if p is not None for tensor in p[2]]
    for ours, theirs in ((values, expected_values), (tangents, expected_tangents)):
        joined = tuple(torch.cat(each, 1 if each[0].ndim == 3 else 0) for each in zip(*theirs, strict=True))
        torch.testing.assert_close(ours, joined)
        weighing = [torch.randn_like(each) for each in joined]
        found = torch.autograd.grad([*ours], leaves, weighing, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad([*joined], leaves, weighing, retain_graph=True))


def draws():
    return Draws(torch.Generator().manual_seed(0))


def leaf(structure, weight):
    """(change, dense change of example i, its leaves) of one weight or bias."""
    if weight is None:
        return None
    if weight.ndim == 1:
        change = torch.randn(N, len(weight), dtype=torch.float64, requires_grad=True)
        return change, lambda i: change[i], [change]
    rows, columns = weight.shape
    shapes = {
        "row-wise": [(rows, columns), (N, rows)], "low-rank": [(rows, 2), (2, columns), (N, 2)],
        "dense": [(N, rows, columns)],
    }[structure]  # fmt: skip
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    dense = {
        "row-wise": lambda i: tensors[1][i][:, None] * tensors[0],
        "low-rank": lambda i: tensors[0] @ (tensors[2][i][:, None] * tensors[1]) if structure == "low-rank" else None,
        "dense": lambda i: tensors[0][i],
    }[structure]
    return (structure, *tensors), dense, tensors


def test_masks_are_for_all_steps_and_follow_each_examples_rate():
    w_hh = torch.zeros(40, 50)
    mask = hidden_mask(w_hh, torch.tensor([0.0, 0.2, 0.9]), (0, 1, 2), draws(), "m")  # two rows for each example
    assert mask.shape == (6, 40, 50)
    for i, rate in enumerate((0.0, 0.2, 0.9)):
        assert torch.equal(mask[2 * i], mask[2 * i + 1])
        assert (mask[2 * i] == 0).double().mean().item() == pytest.approx(rate, abs=0.03)
        kept = mask[2 * i][mask[2 * i] != 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))


def test_patterns_choose_layers_and_others_keep_the_fused_operator():
    stn = stn_fx.transform(AwdLM().double(), "weight_drop@layers.1, weight_drop@layers.2", (tokens(3),), seed=0)
    assert stn.hparams.names == ("weight_drop.layers.1.weight_hh_l0", "weight_drop.layers.2.weight_hh_l0")
    targets = [node.target.__name__ for node in stn.compiled.base.graph.nodes if node.op == "call_function"]
    assert targets.count("dropped_layer") == 2
    assert targets.count("recurrent_layer") == 1
    shared = stn_fx.transform(Tagger().double(), "weight_drop(shared)", (tokens(3),), seed=0)
    assert shared.hparams.names == ("weight_drop",)
    assert len(shared.compiled.plan.sites) > 3  # two layers of two directions, and the dropout between them
    assert stn_fx.check(shared, tokens(3)).passed
    with pytest.raises(UnknownHyperparameterError, match="weight_drop"):
        stn_fx.transform(nn.Linear(2, 2), "weight_drop", (torch.zeros(2, 2),))


@pytest.mark.parametrize("algorithm", [None, WithoutLinearization(), STN])
def test_a_run_of_every_algorithm(algorithm):
    stn = stn_fx.transform(Tagger(nn.GRU, 1, 0.0), "weight_drop(shared)", (tokens(6),), seed=0)
    randomise_response(stn, torch.Generator().manual_seed(1))
    steps = STN(stn) if algorithm is STN else stn_fx.DeltaSTN(stn, response_step=algorithm)
    before = stn.hparams.raw.detach().clone()
    batch = (tokens(6), torch.arange(6) % 3)
    for _ in range(3):
        assert not steps.inner_step(batch).skipped
        steps.outer_step(batch)
    assert (stn.hparams.raw != before).all()
