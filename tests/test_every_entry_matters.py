"""Every entry matters: the learned response predicts what retraining at other values does to the validation loss.

`test_entries_matter.py` has those that act on an image and show in a linear model with a row-wise response; here are
all others, each on a problem that it has an effect on.
"""

import pytest
import torch
from retraining import Problem, Weighted, compare, cross_entropy
from test_entries_matter import INITIAL
from torch import nn

import stn_fx
from stn_fx.hparams import CATALOGUE

SIDE, WORDS, LENGTH = 5, 12, 9
PIXELS = 3 * SIDE * SIDE


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


# ---- vectors of features


class Halved(nn.Module):
    """A module with an output of its own, which sites can be inserted at."""

    def forward(self, x):
        return x / 2


def correlated(seed, count, size=12):
    """Features with an effective dimension well below their number."""
    return normal(seed, count, size) @ normal(98, size, size) / size**0.5


def independent(seed, count, size=12):
    return normal(seed, count, size)


def classes(seed, count, x=None, noise=2.0):
    x = normal(seed, count, 12) if x is None else x
    flat = x.flatten(1)
    score = 2 * flat @ normal(99, flat.shape[1]) / flat.shape[1] ** 0.5 + noise * normal(seed + 50, count)
    return x, (score > 0).long()


def on_features(hparams, make=correlated, **options):
    def data(seed, count):
        x = make(seed, count)
        return x, x @ (normal(99, 12).abs() + 0.5) + 3.0 * normal(seed + 50, count)

    return Problem(hparams, lambda: Weighted(Halved(), 12), data(0, 40), data(1, 2000), **options)


def on_classes(hparams, x=None, **options):
    def model():
        return Weighted(nn.Flatten() if x else Halved(), PIXELS if x else 12, scores=True)

    train, valid = classes(0, 60, x and x(0, 60)), classes(1, 2000, x and x(1, 2000))
    return Problem(hparams, model, train, valid, loss=cross_entropy, **options)


# ---- images


class Pixels(nn.Module):
    def forward(self, x):
        return (x.flatten(1) - 0.5) * 12**0.5


def images(seed, count):
    return torch.rand(count, 3, SIDE, SIDE, generator=generator(seed), dtype=torch.float64)


def shifted_images(seed, count):
    return (images(seed, count) - 0.5) * 12**0.5


def on_images(hparams, noise=8.0, make=images, **options):
    def data(seed, count):
        x = make(seed, count)
        return x, Pixels()(x) @ normal(99, PIXELS) + noise * normal(seed + 50, count)

    options = {"copies": 30, "repetitions": 4, "response_copies": 8} | options
    return Problem(hparams, lambda: Weighted(Pixels(), PIXELS), data(0, 300), data(1, 2000), **options)


# ---- tokens


class Counts(nn.Module):
    """How often each word occurs, (B, WORDS + 1): the last is the mask."""

    def forward(self, tokens):
        return (tokens[:, :, None] == torch.arange(WORDS + 1)).double().sum(1)


def on_tokens(hparams, **options):
    def data(seed, count):
        words = torch.randint(0, WORDS, (count, LENGTH // 3), generator=generator(seed))
        tokens = words.repeat_interleave(3, 1)  # in runs, so that spans hide more than single masks do
        y = Counts()(tokens)[:, :WORDS] @ normal(99, WORDS) + 6.0 * normal(seed + 50, count)
        return tokens, y

    options = {"copies": 40, "repetitions": 4} | options
    return Problem(hparams, lambda: Weighted(Counts(), WORDS + 1), data(0, 80), data(1, 2000), **options)


# ---- sequences


class Hidden(nn.Module):
    """A sequence (B, T, 1) that is linear in the weights."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return (x * self.weight).sum(2, keepdim=True)


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = Hidden()

    def forward(self, x):
        return self.hidden(x).mean((1, 2))


def on_sequences(hparams):
    def data(seed, count):
        x = normal(seed, count, 6, 8)
        return x, x.mean(1) @ normal(99, 8) + normal(seed + 50, count)

    return Problem(hparams, Sequence, data(0, 40), data(1, 2000))


class Recurrent(nn.Module):
    """A recurrent network of which the hidden weights alone are trained."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.RNN(2, 4, batch_first=True)
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name == "weight_hh_l0")

    def forward(self, x):
        return self.net(x)[0].sum((1, 2))


def on_recurrent_networks(hparams):
    teacher = Recurrent().double()

    def data(seed, count):
        x = normal(seed, count, 6, 2)
        with torch.no_grad():
            return x, teacher(x) + 0.5 * normal(seed + 50, count)

    return Problem(hparams, Recurrent, data(0, 40), data(1, 1000), copies=40, repetitions=4)


PROBLEMS = {
    "weight_decay": lambda: on_features("weight_decay@weight(initial=0.1)"),
    "l1": lambda: on_features("l1@weight(initial=0.1, high=1)", independent),
    "label_smoothing": lambda: on_classes("label_smoothing(initial=0.1)"),
    "confidence_penalty": lambda: on_classes("confidence_penalty(initial=0.3)"),
    "mixup": lambda: on_classes("mixup(initial=0.3)", copies=60, repetitions=4),
    "cutmix": lambda: on_classes("cutmix(initial=0.5)", shifted_images, copies=60, repetitions=4),
    "dropout": lambda: on_features("dropout@features(initial=0.3)", independent, copies=60, repetitions=4),
    "drop_path": lambda: on_features("drop_path@features(initial=0.3)", copies=60, repetitions=4),
    "weight_drop": lambda: on_recurrent_networks("weight_drop(initial=0.2)"),
    "noise": lambda: on_features("noise@features(initial=0.4)", copies=60, repetitions=4),
    "contrast": lambda: on_images("contrast(initial=0.6)", options={"image_format": stn_fx.ImageFormat()}),
    "random_erasing": lambda: on_images("random_erasing(probability.initial=0.4, area.initial=0.2)"),
    "cutout": lambda: on_images(
        "cutout(holes=0..4, holes.initial=2, length=0..4, length.initial=2)",
        noise=4.0,
        step=1.0,
        copies=12,
        response_copies=4,
    ),
    "word_dropout": lambda: on_tokens(f"word_dropout(mask_token={WORDS}, padding=-1, initial=0.3)"),
    "span_masking": lambda: on_tokens(
        f"span_masking(mask_token={WORDS}, padding=-1, rate.initial=0.3, length=0..6, length.initial=3)", step=1.0
    ),
    "activation_regularization": lambda: on_sequences("activation_regularization@hidden(initial=0.3)"),
    "temporal_activation_regularization": lambda: on_sequences(
        "temporal_activation_regularization@hidden(initial=0.1)"
    ),
}


@pytest.mark.parametrize("entry", PROBLEMS)
def test_the_response_predicts_what_retraining_gives(entry):
    for each in compare(PROBLEMS[entry]()):
        assert abs(each.retrained) > 2 * each.error, f"the problem does not show the effect: {each}"
        assert 0.5 < each.predicted / each.retrained < 2, str(each)


def test_every_entry_has_such_a_test():
    assert {*INITIAL, *PROBLEMS} == set(CATALOGUE.names)
