"""Augmentation modules of kornia in a model's own forward."""

import math

import pytest
import torch
from augmented_models import assert_left, assert_same_distribution, assert_sites
from torch import nn

import stn_fx
from stn_fx.compiler.recognised_augmentations import Other, recognised
from stn_fx.errors import CaptureError

K = pytest.importorskip("kornia.augmentation")

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self, *augmentations, behind=False):
        super().__init__()
        self.augment, self.behind = nn.Sequential(*augmentations), behind
        self.conv, self.head = nn.Conv2d(3, 3, 3), nn.Linear(3, 2)

    def forward(self, x):
        if self.training and not self.behind:
            x = self.augment(x)
        x = self.conv(x)
        if self.training and self.behind:
            x = self.augment(x)
        return self.head(x.relu().flatten(2).mean(2)), x


SITES = {
    "horizontal_flip": (lambda: K.RandomHorizontalFlip(p=0.3), 0.3),
    "rotation": (lambda: K.RandomRotation(15.0, p=1.0), 15.0),
    "gaussian_noise": (lambda: K.RandomGaussianNoise(0.0, 0.2, p=1.0), 0.2),
}


@pytest.mark.parametrize("entry", SITES)
def test_recognised_modules_become_sites_with_their_own_value(entry):
    build, value = SITES[entry]
    stn = stn_fx.transform(Net(build()).double(), entry, (X,), seed=0).train()
    (site,) = stn.compiled.plan.sites
    assert (site.name, site.entry, site.own_rate, site.inserted) == ("augment.0", entry, value, False)
    assert stn.hparams.values() == {entry: pytest.approx(value)}
    stn.hparams.raw.data.fill_(-50.0)
    plain = stn.model.eval()(X)
    torch.testing.assert_close(stn(X), plain)
    raw = torch.full((4, 1), -50.0, dtype=torch.float64)
    raw[1] = 50.0
    (_, ours), _ = stn.linearize(X, raw=raw)
    changed = [not torch.equal(a, b) for a, b in zip(ours, plain[1], strict=True)]
    assert changed == [False, True, False, False]
    if entry == "horizontal_flip":
        torch.testing.assert_close(ours[1], stn.model.conv(X[1:2].flip(3))[0])
    stn.hparams.raw.data.fill_(0.0)
    assert stn_fx.check(stn, X).passed
    stn.finalize()
    assert "augment.0 keeps the value" in stn.finalized.without_place[entry]


@pytest.mark.parametrize("build", [
    lambda: K.RandomRotation(15.0, p=0.5),
    lambda: K.RandomErasing(p=0.5),
    lambda: K.RandomAffine(10.0, (0.1, 0.1), p=1.0),
    lambda: K.AugmentationSequential(K.RandomHorizontalFlip(p=0.5), K.RandomRotation(5.0)),
])  # fmt: skip
def test_others_run_as_themselves(build):
    stn = stn_fx.transform(Net(build()).double(), "weight_decay,rotation(initial=1)", (X,), seed=0).train()
    first, second = stn(X)[1], stn(X)[1]
    assert not torch.equal(first, second)
    steps = stn_fx.DeltaSTN(stn, loss=lambda output, target: nn.functional.cross_entropy(output[0], target))
    for _ in range(2):
        assert not steps.inner_step((X, torch.tensor([0, 1, 0, 1]))).skipped
        steps.outer_step((X, torch.tensor([0, 1, 0, 1])))


def test_a_site_behind_trained_layers_is_refused():
    with pytest.raises(CaptureError, match="stands behind trained layers"):
        stn_fx.transform(Net(K.RandomHorizontalFlip(p=0.5), behind=True).double(), "horizontal_flip", (X,))


AFFINE = {"degrees": 10.0, "translate": (0.1, 0.1), "scale": (0.8, 1.25), "shear": (-5.0, 5.0, -5.0, 5.0), "p": 1.0}
MAPS = {"rotation": 10, "translation": 0.1, "scaling": math.log(1.25), "shear": 5}
JITTER = {"brightness": 0.3, "contrast": 0.2, "saturation": 0.4, "hue": 0.1}
WIDER = {
    "jitter": (
        lambda: K.ColorJitter(0.3, 0.2, 0.4, 0.1),
        {"brightness": 0.3, "contrast": 0.2, "saturation": 0.4, "hue": 0.1},
    ),
    "hue": (lambda: K.RandomHue((-0.2, 0.2), p=1.0), {"hue": 0.2}),
    "affine": (
        lambda: K.RandomAffine(**AFFINE),
        {"rotation": 10, "translation": 0.1, "scaling": math.log(1.25), "shear": 5},
    ),
    "translate": (lambda: K.RandomTranslate((-0.2, 0.2), (-0.2, 0.2), p=1.0), {"translation": 0.2}),
    "shear": (lambda: K.RandomShear((-9.0, 9.0, -9.0, 9.0), p=1.0), {"shear": 9.0}),
    "blur": (lambda: K.RandomGaussianBlur((5, 5), (0.1, 1.5), p=1.0), {"gaussian_blur": 1.5}),
}


@pytest.mark.parametrize(("build", "values"), WIDER.values(), ids=WIDER)
def test_one_module_is_a_site_of_every_entry_that_it_does(build, values):
    assert_sites(build(), values)


@pytest.mark.parametrize(("build", "hparams"), [
    (lambda: K.ColorJitter(0.3, 0.8, 0.8, 0.2, order=(0, 1, 2, 3)), "brightness, contrast, saturation, hue"),
    (lambda: K.RandomHue((-0.2, 0.2), p=1.0), "hue"),
    (lambda: K.RandomAffine(20.0, (0.2, 0.2), None, (-15.0, 15.0, -15.0, 15.0), p=1.0), "rotation, translation, shear"),
    (lambda: K.RandomAffine(20.0, (0.2, 0.2), None, (-15.0, 15.0, -15.0, 15.0), p=1.0), "translation"),
    (lambda: K.RandomTranslate((-0.3, 0.3), (-0.3, 0.3), p=1.0), "translation"),
    (lambda: K.RandomGaussianBlur((5, 5), (0.5, 1.5), p=1.0), "gaussian_blur"),
])  # fmt: skip
def test_at_its_own_values_a_site_draws_as_the_module(build, hparams):
    assert_same_distribution(build(), hparams, one_by_one=False)


@pytest.mark.parametrize(("build", "hparams", "reason"), [
    (lambda: K.RandomRotation(15.0, p=0.5), "rotation", "probability 0.5"),
    (lambda: K.RandomHorizontalFlip(p=0.5, same_on_batch=True), "horizontal_flip", "once for a whole batch"),
    (lambda: K.RandomErasing(p=0.5), "random_erasing", "aspects are not log-uniform"),
    (lambda: K.RandomAffine(10.0, (0.1, 0.2), p=1.0), "rotation", "shifts by other amounts"),
    (lambda: K.RandomAffine(10.0, padding_mode="border", p=1.0), "rotation", "other than 0"),
    (lambda: K.RandomGaussianBlur((3, 3), (0.1, 2.0), border_type="replicate", p=1.0), "gaussian_blur", "reflected"),
])  # fmt: skip
def test_a_module_with_other_settings_stays_as_it_is_and_the_report_says_why(build, hparams, reason):
    assert_left(build(), hparams, reason)


@pytest.mark.parametrize(("build", "reason"), [
    (lambda: K.RandomBrightness((0.8, 1.2), p=1.0), "adds to the pixels"),
    (lambda: K.RandomContrast((0.8, 1.2), p=1.0), "multiplies the pixels"),
    (lambda: K.RandomSaturation((0.8, 1.2), p=1.0), "saturation of HSV"),
    (lambda: K.ColorJiggle(0.1, 0.1, 0.1, 0.1, p=1.0), "adds to the brightness"),
    (lambda: K.RandomResizedCrop((8, 8)), "changes the size"),
    (lambda: K.ColorJitter(0.3, 0.2, order=(1, 0)), "its order is (1, 0)"),
])  # fmt: skip
def test_operations_that_only_share_a_name_are_other(build, reason):
    found = recognised(build())
    assert isinstance(found, Other)
    assert reason in found.reason
