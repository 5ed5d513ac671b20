"""Augmentation modules of kornia in a model's own forward."""

import pytest
import torch
from torch import nn

import stn_fx
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
