"""Augmentation modules of torchvision in a model's own forward."""

import math

import pytest
import torch
import torch.nn.functional as F
from augmented_models import X as IMAGES
from augmented_models import assert_left, assert_same_distribution, assert_sites, transformed
from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2

import stn_fx
from stn_fx.compiler.recognised_augmentations import Other, recognised
from stn_fx.errors import CaptureError, StnError, UnknownHyperparameterError

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BILINEAR = {"interpolation": InterpolationMode.BILINEAR}


class Net(nn.Module):
    def __init__(self, *augmentations):
        super().__init__()
        self.augment = nn.Sequential(*augmentations)
        self.conv, self.head = nn.Conv2d(3, 3, 3), nn.Linear(3, 2)

    def forward(self, x):
        x = self.conv(self.augment(x) if self.training else x)
        return self.head(x.relu().flatten(2).mean(2)), x


SITES = {
    "flip, v2": (lambda: v2.RandomHorizontalFlip(0.3), "horizontal_flip", 0.3),
    "flip, v1": (lambda: v1.RandomHorizontalFlip(0.3), "horizontal_flip", 0.3),
    "rotation, v2": (lambda: v2.RandomRotation(15, **BILINEAR), "rotation", 15.0),
    "rotation, v1": (lambda: v1.RandomRotation(15, **BILINEAR), "rotation", 15.0),
    "noise": (lambda: v2.GaussianNoise(sigma=0.2, clip=False), "gaussian_noise", 0.2),
}


@pytest.mark.parametrize(("build", "entry", "value"), SITES.values(), ids=SITES)
def test_recognised_modules_become_sites_with_their_own_value(build, entry, value):
    stn = stn_fx.transform(Net(build()).double(), entry, (X,), seed=0).train()
    (site,) = stn.compiled.plan.sites
    assert (site.name, site.entry, site.own_rate, site.inserted) == ("augment.0", entry, value, False)
    assert stn.hparams.values() == {entry: pytest.approx(value)}
    raw = torch.full((4, 1), -50.0, dtype=torch.float64)
    raw[1] = 50.0
    (_, ours), _ = stn.linearize(X, raw=raw)
    plain = stn.model.conv(X)
    assert [not torch.allclose(a, b) for a, b in zip(ours, plain, strict=True)] == [False, True, False, False]
    if entry == "horizontal_flip":
        torch.testing.assert_close(ours[1], stn.model.conv(X[1:2].flip(3))[0])
    assert stn_fx.check(stn, X).passed


@pytest.mark.parametrize(
    "build",
    [
        lambda: v2.RandomHorizontalFlip(0.5),
        lambda: v2.RandomRotation(15),
        lambda: v2.ColorJitter(0.2, 0.2),
        lambda: v2.RandomErasing(0.5),
        lambda: v2.Compose([v2.RandomHorizontalFlip(), v2.RandomRotation(10)]),
    ],
)
def test_what_is_not_tuned_runs_as_itself(build):
    stn = stn_fx.transform(Net(build()).double(), "weight_decay", (X,), seed=0)
    assert any("augment.0 runs as itself" in note for note in stn.report.notes)
    assert stn_fx.check(stn, X).passed


def test_what_is_not_recognised_is_no_site_and_an_input_stays_the_place():
    stn = stn_fx.transform(Net(v2.RandomRotation(15)).double(), "rotation", (X,), seed=0)  # nearest pixels
    (site,) = stn.compiled.plan.sites
    assert site.inserted
    with pytest.raises(UnknownHyperparameterError):
        stn_fx.transform(Net(v2.RandomRotation(15)).double(), "rotation@augment.0", (X,), seed=0)


def test_a_module_that_takes_more_than_images_is_refused():
    class WithBoxes(Net):
        def forward(self, x):
            x, _ = self.augment[0](x, x) if self.training else (x, x)
            return self.head(self.conv(x).flatten(2).mean(2))

    with pytest.raises(StnError, match="more than one image batch"):
        stn_fx.transform(WithBoxes(v2.RandomHorizontalFlip()).double(), "horizontal_flip", (X,), seed=0)


AFFINE = {"degrees": 10, "translate": (0.1, 0.1), "scale": (0.8, 1.25), "shear": (-5, 5, -5, 5)} | BILINEAR
MAPS = {"rotation": 10, "translation": 0.1, "scaling": math.log(1.25), "shear": 5}
JITTER = {"brightness": 0.3, "contrast": 0.2, "saturation": 0.4, "hue": 0.1}
WIDER = {
    "jitter, v2": (
        lambda: v2.ColorJitter(0.3, 0.2, 0.4, 0.1),
        {"brightness": 0.3, "contrast": 0.2, "saturation": 0.4, "hue": 0.1},
    ),
    "jitter, v1": (lambda: v1.ColorJitter(0.3, hue=0.1), {"brightness": 0.3, "hue": 0.1}),
    "affine, v2": (
        lambda: v2.RandomAffine(**AFFINE),
        {"rotation": 10, "translation": 0.1, "scaling": math.log(1.25), "shear": 5},
    ),
    "affine, v1": (lambda: v1.RandomAffine(10, **BILINEAR), {"rotation": 10}),
    "blur, v2": (lambda: v2.GaussianBlur(5, (0.1, 1.5)), {"gaussian_blur": 1.5}),
    "blur, v1": (lambda: v1.GaussianBlur((5, 5), (0.1, 1.0)), {"gaussian_blur": 1.0}),
    "erasing, v2": (lambda: v2.RandomErasing(0.4), {"random_erasing.probability": 0.4, "random_erasing.area": 0.33}),
    "erasing, v1": (lambda: v1.RandomErasing(0.4), {"random_erasing.probability": 0.4, "random_erasing.area": 0.33}),
}


@pytest.mark.parametrize(("build", "values"), WIDER.values(), ids=WIDER)
def test_one_module_is_a_site_of_every_entry_that_it_does(build, values):
    assert_sites(build(), values)


@pytest.mark.parametrize(
    ("module", "hparams"),
    [
        (v2.ColorJitter(brightness=0.3), "brightness"),
        (v2.ColorJitter(contrast=0.8), "contrast"),
        (v2.ColorJitter(saturation=0.8), "saturation"),
        (v1.ColorJitter(hue=0.2), "hue"),
        (v2.RandomAffine(20, shear=(-15, 15, -15, 15), fill=None, **BILINEAR), "rotation, shear"),
        (v2.RandomAffine(20, shear=(-15, 15, -15, 15), fill=None, **BILINEAR), "shear"),
        (v2.GaussianBlur(5, (0.5, 1.5)), "gaussian_blur"),
        (v2.RandomErasing(0.6, (0.1, 0.2)), "random_erasing"),
    ],
)
def test_at_its_own_values_a_site_draws_as_the_module(module, hparams):
    assert_same_distribution(module, hparams, one_by_one=True)


@pytest.mark.parametrize(
    ("module", "hparams", "reason"),
    [
        (v2.RandomRotation(15), "rotation", "does not interpolate"),
        (v2.RandomErasing(0.5, value=1), "random_erasing", "fills with something other than 0"),
        (v2.GaussianBlur((3, 5)), "gaussian_blur", "not square"),
    ],
)
def test_a_module_with_other_settings_stays_as_it_is_and_the_report_says_why(module, hparams, reason):
    assert_left(module, hparams, reason)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (v2.RandomRotation((0, 15), **BILINEAR), "0 to 15 does not lie evenly around 0"),
        (v2.RandomAffine(10, shear=5, **BILINEAR), "shears by other amounts along x (5) than along y (0)"),
        (v2.RandomAffine(10, scale=(0.9, 1), **BILINEAR), "it scales by (0.9, 1)"),
        (v2.ColorJitter(1.5), "0 to 2.5 does not lie evenly around 1"),
        (v2.RandomErasing(ratio=(0.5, 2)), "its aspects are (0.5, 2)"),
        (v2.RandomResizedCrop(8), "changes the size"),
        (v2.ColorJitter(), "switched off"),
    ],
)
def test_settings_that_no_value_of_an_entry_stands_for(module, reason):
    found = recognised(module)
    assert isinstance(found, Other)
    assert reason in found.reason


WITHOUT_GRADIENT = {
    "rotation": lambda: v2.RandomRotation((0, 15), **BILINEAR),
    "perspective": lambda: v2.RandomPerspective(p=1.0),
    "AugMix": lambda: v2.AugMix(),
}
"""These write over what their own backward needs."""


@pytest.mark.parametrize("build", WITHOUT_GRADIENT.values(), ids=WITHOUT_GRADIENT)
def test_nobody_needs_the_gradient_of_what_changes_the_input(build):
    stn = stn_fx.transform(Net(build()).double(), "weight_decay", (X,), seed=0).train()
    assert stn_fx.check(stn, X).passed
    steps = stn_fx.DeltaSTN(stn, lambda output, target: F.cross_entropy(output[0], target))
    weight = stn.model.conv.weight.detach().clone()
    for _ in range(2):
        steps.inner_step((X, torch.arange(4) % 2))
    steps.outer_step((X, torch.arange(4) % 2))
    assert not torch.equal(weight, stn.model.conv.weight)


@pytest.mark.parametrize("name", ["rotation", "perspective"])
def test_a_module_without_a_gradient_is_refused_behind_weights(name):
    model = nn.Sequential(nn.Conv2d(3, 3, 3), WITHOUT_GRADIENT[name](), nn.Flatten(), nn.Linear(108, 2)).double()
    with pytest.raises(CaptureError, match="its gradient cannot be computed"):
        stn_fx.transform(model, "weight_decay", (X,), seed=0)


def test_entries_of_a_module_that_are_not_asked_for_act_at_its_own_values():
    stn = transformed(v2.RandomAffine(10, (0.2, 0.2), **BILINEAR), "rotation")
    assert [(s.entry, s.own_rate, bool(s.hyperparameters)) for s in stn.compiled.plan.sites] == [
        ("rotation", 10.0, True),
        ("translation", 0.2, False),
    ]
    stn.hparams.raw.data.fill_(-50.0)
    assert not torch.allclose(stn(IMAGES)[1], IMAGES)


@pytest.mark.parametrize(
    ("module", "hparams"),
    [
        (v2.ColorJitter(0.4, 0.4), "brightness,contrast"),
        (v2.ColorJitter(hue=0.1), "hue"),
        (v2.GaussianBlur(3), "gaussian_blur"),
        (v2.RandomRotation(15, **BILINEAR), "rotation"),
    ],
)
def test_images_of_whole_numbers_are_refused(module, hparams):
    class Bytes(Net):
        def forward(self, x):
            x = self.augment(x) if self.training else x
            return self.head((self.conv(x.to(self.conv.weight.dtype) / 255)).relu().flatten(2).mean(2))

    x = (X * 255).to(torch.uint8)
    with pytest.raises(CaptureError, match=r"augment.0 acts on images of whole numbers.*ToDtype"):
        stn_fx.transform(Bytes(module).double(), hparams, (x,))
