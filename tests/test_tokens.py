"""Word dropout and span masking: rates, spans, padding, and as sites of a model."""

import pytest
import torch
from torch import nn

import stn_fx
from stn_fx.augment import Draws
from stn_fx.augment.tokens import mask_spans, mask_words
from stn_fx.errors import InputError

MASK, PAD = 99, 0


def draws(seed=0):
    return Draws(torch.Generator().manual_seed(seed))


def tokens(batch, length):
    return torch.arange(1, length + 1).remainder(50).add(1).expand(batch, length).clone()


def test_words_are_dropped_at_their_rates_and_padding_never():
    x = tokens(4, 50_000)
    x[:, ::5] = PAD
    rate = torch.tensor([0.0, 0.1, 0.5, 1.0])
    y = mask_words(x, rate, draws(), "w", MASK, PAD)
    assert torch.equal(y[:, ::5], x[:, ::5])
    share = ((y == MASK).sum(1) / (x != PAD).sum(1)).tolist()
    assert share == pytest.approx([0, 0.1, 0.5, 1], abs=0.01)
    assert torch.equal(y[y != MASK], x[y != MASK])
    assert (mask_words(x, rate, draws(), "w", MASK, -1)[3] == MASK).all()


def test_spans_have_their_share_and_length():
    x = tokens(5, 100_000)
    rate, length = torch.tensor([0.0, 0.15, 0.15, 0.5, 0.15]), torch.tensor([3.0, 1.0, 4.0, 10.0, 0.0])
    masked = mask_spans(x, rate, length, 10, draws(), "s", MASK, PAD) == MASK
    assert masked.double().mean(1).tolist() == pytest.approx(rate.tolist(), abs=0.01)
    edges = masked[2].int().diff()
    starts, ends = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    ends = ends[ends > starts[0]][: len(starts)]
    runs = ends - starts[: len(ends)]
    assert runs.min() == 4
    assert masked[1].double().mean() > 0
    early = mask_spans(
        tokens(20_000, 3), torch.full((20_000,), 0.3), torch.full((20_000,), 5.0), 10, draws(), "s", MASK, 0
    )
    assert (early == MASK).double().mean(0).tolist() == pytest.approx([0.3] * 3, abs=0.02)


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 7)])
def test_any_shape_and_rate_zero(shape):
    x = tokens(*shape)
    for rate in (0.0, 1e-22):
        rate_B = torch.full((shape[0],), rate)
        assert torch.equal(mask_words(x, rate_B, draws(), "w", MASK, PAD), x)
        assert torch.equal(mask_spans(x, rate_B, torch.full((shape[0],), 3.0), 10, draws(), "s", MASK, PAD), x)


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 8)
        self.rnn = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids):
        h = self.drop(self.rnn(self.embed(input_ids)).tanh())
        return self.head(h.mean(1)), h, input_ids + 0


@pytest.mark.parametrize("hparams", ["word_dropout(mask_token=99),dropout", "span_masking(mask_token=99),dropout"])
def test_as_a_site(hparams):
    torch.manual_seed(0)
    x = tokens(6, 20)
    stn = stn_fx.transform(Text().double(), hparams, {"input_ids": x}, seed=0)
    raw = torch.full((6, len(stn.hparams)), -50.0, dtype=torch.float64)
    raw[2] = 4.0
    (_, _, seen), _ = stn.linearize(input_ids=x, raw=raw)
    assert (seen == MASK).any(1).tolist() == [i == 2 for i in range(6)]
    assert stn_fx.check(stn, {"input_ids": x}).passed


def test_options_in_objects_and_mistakes():
    x = {"input_ids": tokens(4, 9)}
    chosen = stn_fx.Hyperparameter("word_dropout", initial=0.3, options={"mask_token": MASK, "padding": 3})
    stn = stn_fx.transform(Text(), [chosen], x)
    assert stn.hparams.values()["word_dropout"] == pytest.approx(0.3)
    with pytest.raises(InputError, match="word_dropout needs mask_token"):
        stn_fx.transform(Text(), "word_dropout", x)
    with pytest.raises(InputError, match="whole number"):
        stn_fx.transform(Text(), "word_dropout(mask_token=1.5)", x)
    with pytest.raises(InputError, match="a flag"):
        stn_fx.transform(Text(), "dropout(locked=3)", x)


def hidden(hparams, raw=2.0):
    torch.manual_seed(0)
    x = tokens(5, 30)
    stn = stn_fx.transform(Text().double(), hparams, (x,), seed=0)
    stn.hparams.raw.data.fill_(raw)
    return stn, stn(x)[1], stn.eval()(x)[1]


def test_locked_dropout_has_one_mask_for_all_times():
    _, h, plain = hidden("dropout(locked)")
    dropped = h == 0
    assert (dropped == dropped[:, :1]).all()
    assert 0 < dropped[:, 0].double().mean() < 1
    assert not torch.equal(dropped[0], dropped[1])
    kept = ~dropped
    assert torch.unique((h / plain)[kept].round(decimals=9)).numel() == 1
    stn, h, _ = hidden("dropout@embed(locked)")
    assert stn.compiled.plan.sites[0].options["locked"]
    _, h, _ = hidden("dropout")
    assert not ((h == 0) == (h == 0)[:, :1]).all()


def test_channel_dropout_where_it_is_inserted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 64, 1))
    x = torch.randn(4, 3, 6, 6)
    stn = stn_fx.transform(model, "dropout@2(channels, initial=0.5)", (x,), seed=0)
    dropped = stn(x) == 0
    assert (dropped == dropped[:, :, :1, :1]).all()
    assert 0.3 < dropped.double().mean() < 0.7
    with pytest.raises(InputError, match="3 or more axes"):
        stn_fx.transform(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1)), "dropout(locked)", (torch.randn(4, 3),))


def test_noise_on_activations():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4000), nn.ReLU(), nn.Linear(4000, 2)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    noisy = nn.Sequential(model, nn.Identity())
    stn = stn_fx.transform(model, "noise@0(initial=0.3)", (x,), seed=0)
    assert stn.hparams.names == ("noise.0",)
    raw = torch.full((4, 1), -50.0, dtype=torch.float64)
    raw[1] = 0.0
    moved = [not torch.equal(a, b) for a, b in zip(stn.linearize(x, raw=raw)[0], model(x), strict=True)]
    assert moved == [False, True, False, False]
    assert stn_fx.check(stn, (x,)).passed
    assert stn_fx.transform(noisy, "noise", (x,), seed=0).hparams.names
    stn = stn_fx.transform(nn.Sequential(nn.Linear(3, 40_000)), "noise@0(initial=0.3)", (x.float(),), seed=0)
    assert (stn(x.float()) - stn.model(x.float())).std(1).tolist() == pytest.approx([0.3] * 4, rel=0.05)
