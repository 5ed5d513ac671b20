"""Models with augmentation modules in their forward, and what is asked of each that becomes a site."""

import pytest
import torch
from torch import nn

import stn_fx

X = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MANY = 1000


class Augmented(nn.Module):
    """Returns the augmented images beside something to train."""

    def __init__(self, module):
        super().__init__()
        self.augment, self.conv, self.head = module, nn.Conv2d(3, 3, 3), nn.Linear(3, 2)

    def forward(self, x):
        images = self.augment(x) if self.training else x
        return self.head(self.conv(images).relu().flatten(2).mean(2)), images


def transformed(module, hparams):
    return stn_fx.transform(Augmented(module).double(), hparams, (X,), seed=0).train()


def assert_sites(module, values):
    """Every entry is a site with the module's value, off at -50, and acts on the rows that it is given for alone."""
    names = {name.partition(".")[0]: None for name in values}
    stn = transformed(module, ",".join(names))
    assert [(site.name, site.entry, site.inserted) for site in stn.compiled.plan.sites] == [
        ("augment", entry, False) for entry in names
    ]
    assert stn.hparams.values() == pytest.approx(values, rel=1e-5)
    assert stn_fx.check(stn, X).passed
    stn.hparams.raw.data.fill_(-50.0)
    torch.testing.assert_close(stn(X)[1], X, rtol=0, atol=1e-12)
    for column in range(len(values)):
        raw = torch.full((len(X), len(values)), -50.0, dtype=X.dtype)
        raw[2] = 50.0 if len(names) == 1 else raw[2]
        raw[2, column] = 50.0
        (_, images), _ = stn.linearize(X, raw=raw)
        assert [not torch.allclose(a, b) for a, b in zip(images, X, strict=True)] == [False, False, True, False]


def assert_same_distribution(module, hparams, one_by_one):
    """At the module's own values the tuned site draws as the module does: two-sample Kolmogorov-Smirnov, p = 0.001."""
    stn = transformed(module, hparams)
    images = X[:1].expand(MANY, -1, -1, -1)
    torch.manual_seed(1)
    theirs = torch.cat([module(image[None]) for image in images]) if one_by_one else module(images)
    ours = stn(images)[1].detach()
    weights = torch.randn(4, images[0].numel(), generator=torch.Generator().manual_seed(2), dtype=X.dtype)
    for ours_N, theirs_N in zip(weights @ ours.flatten(1).T, weights @ theirs.flatten(1).T, strict=True):
        # Images that stay as they are differ by rounding: that must not count as an order of theirs and ours.
        both = torch.cat([ours_N, theirs_N]).float().round(decimals=4)
        places = both.unique()
        shares = [torch.searchsorted(part.sort().values, places, right=True) / MANY for part in both.split(MANY)]
        assert (shares[0] - shares[1]).abs().max() < 1.95 * (2 / MANY) ** 0.5


def assert_left(module, hparams, reason):
    """The module is no site, and the report says why."""
    stn = transformed(module, hparams)
    assert all(site.inserted for site in stn.compiled.plan.sites)
    (note,) = [note for note in stn.report.notes if "stays as it is" in note]
    assert note.startswith("augment (")
    assert reason in note
