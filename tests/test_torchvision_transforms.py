"""Augmentation modules of torchvision in a model's own forward."""

import pytest
import torch
from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2

import stn_fx
from stn_fx.errors import StnError, UnknownHyperparameterError

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
