"""Recurrent networks in whole models: language models with tied embeddings and carried state; what is refused."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import EVERY_ORACLE, Subject, assert_sites, conditioned_share, unconditioned
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import stn_fx
from stn_fx.compiler.emit import emit
from stn_fx.compiler.proof import prove
from stn_fx.errors import BatchLayoutError, CaptureError

RESPONSES: dict[str, Any] = {
    "row-wise": "rowwise",
    "two terms": stn_fx.RowWise(2),
    "low-rank": stn_fx.LowRank(2),
}
VOCABULARY = 11


class TiedLM(nn.Module):
    """The classic word model: embedding and decoder share their weight; state in, state out; tokens (T, B)."""

    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(VOCABULARY, 4), nn.Dropout(0.3)
        self.lstm = nn.LSTM(4, 4, 2, dropout=0.2, batch_first=batch_first)
        self.decoder = nn.Linear(4, VOCABULARY)
        self.decoder.weight = self.embed.weight

    def forward(self, tokens: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, state = self.lstm(self.drop(self.embed(tokens)), state)
        return self.decoder(self.drop(x)), state


class AwdLM(nn.Module):
    """AWD-LSTM (Merity et al. 2018, arXiv 1708.02182) without dropped weights: LSTMs of several widths, tied ends."""

    def __init__(self) -> None:
        super().__init__()
        widths = [4, 6, 6, 4]
        self.embed = nn.Embedding(VOCABULARY, widths[0])
        self.layers = nn.ModuleList(nn.LSTM(*pair, batch_first=True) for pair in pairwise(widths))
        self.drops = nn.ModuleList(nn.Dropout(p) for p in (0.4, 0.25, 0.25, 0.4))
        self.decoder = nn.Linear(widths[-1], VOCABULARY)
        self.decoder.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.drops[0](self.embed(tokens))
        for layer, drop in zip(self.layers, list(self.drops)[1:], strict=True):
            x = drop(layer(x)[0])
        return self.decoder(x)


class Tagger(nn.Module):
    """Tokens (B, T) to a class for each sequence, from the last states of both directions."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, layers: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 3)
        self.net = kind(3, 4, layers, dropout=dropout, bidirectional=True, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        last = self.net(self.embed(tokens))[1]
        last = last[0] if isinstance(last, tuple) else last
        return self.head(torch.cat([last[-2], last[-1]], -1))


def tokens(batch: int, length: int = 4, batch_first: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    drawn = torch.randint(VOCABULARY, (batch, length), generator=generator)
    return drawn if batch_first else drawn.t().contiguous()


def state(batch: int, layers: int = 2, width: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    h, c = torch.randn(2, batch, layers, width, generator=generator, dtype=torch.float64).transpose(1, 2)
    return h.contiguous(), c.contiguous()


MODELS: dict[str, dict[str, Any]] = {
    "tied, state carried, sequence first": {
        "build": TiedLM,
        "inputs": lambda batch: (tokens(batch, 5, batch_first=False), state(batch)),
        "batch_axis": 1,
    },
    "tied, state carried, batch first": {
        "build": lambda: TiedLM(batch_first=True),
        "inputs": lambda batch: (tokens(batch), state(batch)),
        "input_axes": (0, 1, 1),
        "output_axes": (0, 1, 1),
    },
    "AWD": {"build": AwdLM, "inputs": lambda batch: (tokens(batch),)},
    "tagger": {"build": Tagger, "inputs": lambda batch: (tokens(batch),)},
}


def test_recurrent_weights_have_one_term_and_say_so() -> None:
    model = Tagger()
    hparams = "dropout,weight_decay,label_smoothing"
    stn = stn_fx.transform(model, hparams, (tokens(3),), response=stn_fx.RowWise(3))
    plans = {plan.name: plan for plan in stn.compiled.plan.parameters}
    recurrent, head = plans["net.weight_ih_l0"], plans["head.weight"]
    assert (recurrent.terms, head.terms) == (1, 3)
    assert "recurrent" in recurrent.reason
    assert stn.responses()["head.weight"].U.shape == (3, *model.head.weight.shape)
    assert head.response_scalars(len(stn.hparams)) == sum(
        p.numel() for p in stn.responses()["head.weight"].parameters()
    )


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("name", MODELS)
def test_models_against_the_oracles(name: str, response: str) -> None:
    subject = Subject(hparams="dropout,weight_decay", response=RESPONSES[response], **MODELS[name])
    assert conditioned_share(subject.stn) == 1.0, list(unconditioned(subject.stn))
    for oracle in EVERY_ORACLE:
        for batch in (1, 2, 5):
            oracle(subject, batch)
    assert_sites(subject, 4)


@pytest.mark.parametrize(("layers", "batch"), [(2, 3), (3, 3), (2, 1)])
def test_the_batch_axes_of_states_are_found(layers: int, batch: int) -> None:
    """Also where the number of layers equals the batch size."""
    model = nn.GRU(3, 4, layers, batch_first=True)
    stn = stn_fx.transform(model, "weight_decay", (torch.randn(batch, 5, 3), torch.randn(layers, batch, 4)))
    assert stn.compiled.captured.batch_axes == [0, 1]
    assert any("[0, 1]" in note for note in stn.compiled.plan.notes)


def test_a_batch_that_lies_along_time_is_refused() -> None:
    with pytest.raises(BatchLayoutError, match="not independent"):
        stn_fx.transform(nn.LSTM(3, 4), "weight_decay", (torch.randn(5, 5, 3),), batch_axis=0)


def test_per_example_weights_are_never_formed() -> None:
    """No tensor of the linearized or response pass is as large as the weights of all examples."""
    size, batch = 64, 16
    x = torch.randn(batch, 3, size)
    for response in RESPONSES.values():
        stn = stn_fx.transform(nn.LSTM(size, size, batch_first=True), "weight_decay", (x,), response=response)
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
            sum(t.sum() for t in _floats(stn.linearize(x))).backward()
            sum(t.sum() for t in _floats(stn.respond(x))).backward()
        events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        largest = max(e.nbytes() for e in events if e.name() == "[memory]")
        assert largest < batch * 4 * size * size * 4 / 4


def _floats(output: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]


def test_dropout_between_layers_is_one_site_per_gap() -> None:
    model = nn.LSTM(3, 4, 3, batch_first=True)
    stn = stn_fx.transform(model, "dropout(initial=0.3)", (torch.randn(2, 5, 3),))
    assert stn.hparams.names == ("dropout.functional", "dropout.functional_1")
    tagger = stn_fx.transform(Tagger(), "dropout", (tokens(2),))
    assert tagger.hparams.names == ("dropout.net.dropout",)


@pytest.mark.parametrize("hparams", ["dropout", "dropout(shared)"])
def test_a_tuned_rate_goes_back_into_the_network(hparams: str) -> None:
    layers = 2 if hparams == "dropout" else 3
    stn = stn_fx.transform(Tagger(layers=layers), hparams, (tokens(2),))
    with torch.no_grad():
        stn.hparams.raw += 1.0
    (value,) = stn.hparams.values().values()
    assert stn.finalize().net.dropout == pytest.approx(value)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_an_emitted_module_computes_the_same(tmp_path: Path, kind: type[nn.RNNBase]) -> None:
    stn = stn_fx.transform(Tagger(kind), "dropout,weight_decay", (tokens(3),), seed=0)
    written = emit(stn.compiled, stn, tmp_path / "tagger_stn.py")
    proof = prove(written.module, stn.compiled, stn)
    assert proof.failure == ""
    assert proof.passed


def test_it_passes_the_check_and_trains() -> None:
    torch.manual_seed(0)
    stn = stn_fx.transform(AwdLM(), "dropout,weight_decay", (tokens(8),))
    assert stn_fx.check(stn, tokens(8)).passed
    steps = stn_fx.DeltaSTN(stn, lambda output, target: nn.functional.cross_entropy(output.transpose(1, 2), target))
    batch, raw = (tokens(8), tokens(8)), stn.hparams.raw.detach().clone()
    losses = [steps.inner_step(batch) for _ in range(30)]
    assert losses[-1].loss < losses[0].loss
    steps.outer_step(batch)
    assert not torch.equal(raw, stn.hparams.raw)


class Packing(nn.Module):
    """Runs over sequences of different lengths as torch packs them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.net(packed)[0], batch_first=True)[0]


def test_packed_sequences_are_refused_with_the_remedy() -> None:
    with pytest.raises(CaptureError, match="padded batch"):
        stn_fx.transform(Packing(), "weight_decay", (torch.randn(3, 5, 3), torch.tensor([5, 3, 2])))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weights_computed_before_use_respond_each_under_their_own_name() -> None:
    model = nn.LSTM(3, 4, 2, batch_first=True)
    for name in ("weight_hh_l0", "weight_hh_l1"):
        nn.utils.weight_norm(model, name)
    stn = stn_fx.transform(nn.Sequential(model), "weight_decay", (torch.randn(3, 5, 3),))
    effective = {plan.name for plan in stn.compiled.plan.parameters if plan.is_effective}
    assert effective == {"0.weight_hh_l0", "0.weight_hh_l1"}


class Translator(nn.Module):
    """A trained encoder hands its state to a frozen decoder: the state alone carries a tangent into it."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = kind(3, 4, batch_first=True, **options), kind(3, 4, batch_first=True, **options)
        self.decoder.requires_grad_(False)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decoder(target, self.encoder(source)[1])[0]


@pytest.mark.parametrize(
    ("kind", "options"), [(nn.LSTM, {}), (nn.LSTM, {"proj_size": 2}), (nn.GRU, {"bias": False}), (nn.RNN, {})]
)
def test_a_tangent_enters_through_the_state_alone(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(batch)
        source = torch.randn(batch, 3, 3, generator=generator, dtype=torch.float64)
        return source, torch.randn(batch, 5, 3, generator=generator, dtype=torch.float64)

    subject = Subject(lambda: Translator(kind, **options), inputs)
    for oracle in EVERY_ORACLE:
        oracle(subject, 2)


def test_a_long_sequence_is_captured_in_a_moment_and_gives_any_other_length() -> None:
    model = nn.Sequential(nn.LSTM(3, 4, batch_first=True))
    stn = stn_fx.transform(model, "weight_decay", (torch.randn(2, 1000, 3),))
    nodes = len(stn.compiled.captured.training.graph.nodes)
    assert nodes < 50, "the graph does not grow with the number of steps"
    primal, tangent = stn.linearize(torch.randn(3, 7, 3))
    assert primal[0].shape == tangent[0].shape == (3, 7, 4)
