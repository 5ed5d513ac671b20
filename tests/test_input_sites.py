"""Augmentations as sites of a model: order, fusion, identity at -50, independence of examples, emitted code."""

import operator
from pathlib import Path

import pytest
import torch
from torch import nn

import stn_fx
from stn_fx.augment import Draws
from stn_fx.compiler.emit import emit
from stn_fx.compiler.proof import prove
from stn_fx.errors import InputError, UnknownHyperparameterError
from stn_fx.hparams import CATALOGUE
from stn_fx.hparams.input_entries import INPUT_ENTRIES
from stn_fx.rules.image_sites import apply_colour, apply_geometry

IMAGE_FORMAT = stn_fx.ImageFormat((0.5, 0.4, 0.3), 0.25)
ON_IMAGES = [entry.name for entry in INPUT_ENTRIES if entry.needs != "tokens"]


class Net(nn.Module):
    """Returns the input that it saw, beside its scores."""

    def __init__(self, channels=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3))), x * 1.0


def images(batch=4, channels=3, dtype=torch.float64):
    return torch.randn(batch, channels, 9, 7, generator=torch.Generator().manual_seed(0)).to(dtype)


def wrapped(hparams, channels=3, image_format=IMAGE_FORMAT, dtype=torch.float64):
    torch.manual_seed(0)
    x = images(channels=channels, dtype=dtype)
    return stn_fx.transform(Net(channels).to(dtype), hparams, (x,), seed=0, image_format=image_format)


def calls(graph):
    return [node for node in graph.graph.nodes if node.op == "call_function" and node.target is not operator.getitem]


@pytest.mark.parametrize("name", ON_IMAGES)
def test_each_entry_acts_on_exactly_the_examples_that_it_should(name):
    stn = wrapped(name)
    x = images(6)
    raw = torch.full((6, len(stn.hparams)), -50.0, dtype=torch.float64)
    _, seen = stn.linearize(x, raw=raw)[0]
    assert torch.equal(seen, x)
    raw[2] = 3.0
    moved = set()
    for _ in range(20):  # a flip may not happen
        seen = stn.linearize(x, raw=raw)[0][1]
        moved |= {i for i in range(6) if not torch.equal(seen[i], x[i])}
    assert moved == {2}
    stn.hparams.raw.data.fill_(3.0)
    assert not torch.equal(stn(x)[1], x)
    assert torch.equal(stn.respond(x)[1], x)
    stn.eval()
    assert torch.equal(stn(x)[1], x)


def test_families_are_fused_and_the_catalogue_orders_them():
    names = list(reversed(ON_IMAGES))
    stn = wrapped(",".join(names))
    for graph in (stn.compiled.base, stn.compiled.linearized_training):
        targets = [node.target.__name__ for node in calls(graph)]
        applied = [name for name in targets if name.startswith("apply_")]
        assert applied == [
            "apply_geometry", "apply_gaussian_blur", "apply_colour", "apply_input_scale", "apply_gaussian_noise",
            "apply_random_erasing", "apply_cutout", "apply_input_dropout",
        ]  # fmt: skip
        (geometry,) = [node for node in calls(graph) if node.target is apply_geometry]
        assert list(geometry.args[1]) == ["horizontal_flip", "rotation", "translation", "scaling", "shear"]
        (colours,) = [node for node in calls(graph) if node.target is apply_colour]
        assert list(colours.args[1]) == ["brightness", "contrast", "saturation", "hue"]
    x = images(5)
    stn.hparams.raw.data.fill_(-50.0)
    assert torch.equal(stn(x)[1], x)
    assert stn_fx.check(stn, (x,)).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_batch_sizes_and_dtypes(batch, dtype):
    stn = wrapped(",".join(ON_IMAGES), dtype=dtype)
    x = images(batch, dtype=dtype)
    assert stn(x)[1].shape == x.shape
    primal, _ = stn.linearize(x)
    assert primal[1].dtype == dtype


def test_emitted_code_runs_in_a_fresh_process(tmp_path: Path):
    stn = wrapped(",".join(ON_IMAGES))
    written = emit(stn.compiled, stn, tmp_path / "net_stn.py")
    proof = prove(written.module, stn.compiled, stn)
    assert proof.failure == ""
    assert proof.passed


def test_what_pixels_mean_must_be_known():
    with pytest.raises(InputError, match=r"hue, contrast act on what pixels mean.*ImageFormat\(mean, std\)"):
        wrapped("hue,dropout,contrast", image_format=None)
    assert wrapped("rotation", image_format=None).hparams.names == ("rotation",)
    with pytest.raises(InputError, match="hue needs images with 3 channels"):
        wrapped("hue", channels=1, image_format=stn_fx.ImageFormat())
    with pytest.raises(InputError, match="describes 3 channels"):
        wrapped("brightness", channels=1)
    assert wrapped("brightness,contrast", channels=1, image_format=stn_fx.ImageFormat()).hparams.names


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, left, right, extra):
        return self.head((left + right).mean((2, 3)) + extra), left * 1.0, right * 1.0, extra * 1.0


def test_inputs_are_chosen_by_name():
    inputs = (images(dtype=torch.float32), images(dtype=torch.float32), torch.ones(4, 3))

    def seen(hparams):
        stn = stn_fx.transform(Two(), hparams, inputs, seed=0)
        return [not torch.equal(value, x) for value, x in zip(stn(*inputs)[1:], inputs, strict=True)]

    assert seen("rotation") == [True, False, False]
    assert seen("rotation@right") == [False, True, False]
    assert seen("rotation@*t") == [True, True, False]
    assert seen("gaussian_noise@extra") == [False, False, True]
    with pytest.raises(UnknownHyperparameterError, match="rotation@extra"):
        seen("rotation@extra")


def test_every_entry_says_where_its_defaults_come_from():
    for entry in CATALOGUE:
        assert entry.source
        assert entry.description
        assert all(component.scale > 0 for component in entry.components)


def test_draws_resume():
    stn = wrapped(",".join(ON_IMAGES))
    x = images(3)
    state = stn.generator().get_state()
    first = stn(x)[1]
    stn.generator().set_state(state)
    assert torch.equal(stn(x)[1], first)
    assert isinstance(stn._draws(), Draws)


def test_holes_without_an_upper_bound_are_refused():
    with pytest.raises(InputError, match=r"cutout\.holes has no upper bound"):
        stn_fx.transform(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)),
            stn_fx.Hyperparameter("cutout.holes", high=float("inf")),
            (torch.randn(4, 3, 8, 8),),
        )
