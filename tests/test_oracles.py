"""The oracles of DESIGN section 6 on whole models, for both response structures and batches of 1, 2 and 5 examples."""

from functools import cache
from typing import Any

import pytest
import torch
from models import MODELS
from oracles import (
    Subject,
    assert_gradients,
    assert_linearized_pass,
    assert_response_pass,
    assert_sites,
    assert_training_graph,
    assert_unchanged,
    conditioned_share,
    fingerprint,
    unconditioned,
)
from torch import nn

import stn_fx

RESPONSES: dict[str, Any] = {"row-wise": "rowwise", "low-rank": stn_fx.LowRank(3)}
BATCHES = (1, 2, 5)


@cache
def subject(name: str, response: str) -> Subject:
    """Compiled with a batch of 3, which no oracle uses; shared by all tests of one process."""
    model = MODELS[name]
    return Subject(model.build, model.inputs, model.hparams, RESPONSES[response], zero_gradients=model.zero_gradients)


each_subject = pytest.mark.parametrize(("name", "response"), [(n, r) for n in MODELS for r in RESPONSES])


@each_subject
def test_at_least_95_percent_of_the_scalars_are_conditioned(name: str, response: str) -> None:
    stn = subject(name, response).stn
    assert conditioned_share(stn) >= 0.95, list(unconditioned(stn))


@each_subject
def test_unchanged(name: str, response: str) -> None:
    for batch in BATCHES:
        # A batch norm over one value per channel is an error in training, the user's model's as ours.
        assert_unchanged(subject(name, response), max(batch, 2) if MODELS[name].frozen_norms else batch)


@each_subject
def test_response_pass(name: str, response: str) -> None:
    for batch in BATCHES:
        assert_response_pass(subject(name, response), batch)


@each_subject
def test_linearized_pass(name: str, response: str) -> None:
    for batch in BATCHES:
        assert_linearized_pass(subject(name, response), batch)


@each_subject
def test_training_graph(name: str, response: str) -> None:
    for batch in (2, 5):
        assert_training_graph(subject(name, response), batch)


@each_subject
def test_gradients(name: str, response: str) -> None:
    assert_gradients(subject(name, response), 2)


@pytest.mark.parametrize("name", MODELS)
def test_sites(name: str) -> None:
    model = MODELS[name]
    if not model.frozen_norms:
        assert_sites(subject(name, "row-wise"), 4)
        return

    def build() -> nn.Module:
        built = model.build()
        for module in built.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return built

    assert_sites(Subject(build, model.inputs, model.hparams), 3)


@pytest.mark.parametrize("name", ["mlp", "resnet18", "vit"])
def test_the_double_backward_trick_agrees(name: str) -> None:
    """A second opinion on the linearized pass that does not rest on forward mode."""
    trial = subject(name, "row-wise")
    inputs, delta_H = trial.inputs(2), trial.displacement(1)[0]
    change = trial.changed_weights(delta_H)
    base = {name: w.clone().requires_grad_() for name, w in trial.base_weights(trial.twin, change).items()}
    (output,) = trial.user(trial.twin.eval(), inputs, base)
    cotangent = torch.zeros_like(output, requires_grad=True)
    pulled = torch.autograd.grad(output, list(base.values()), cotangent, create_graph=True)
    along = sum((p * change[name]).sum() for name, p in zip(base, pulled, strict=True))
    (judged,) = torch.autograd.grad(along, cotangent)
    trial.stn.eval()
    _, tangent = trial.stn.linearize(*inputs, raw=trial.raw(delta_H.expand(2, -1)))
    torch.testing.assert_close(tangent, judged, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_transform_leaves_the_model_as_it_was(name: str) -> None:
    model = MODELS[name].build().double()
    next(iter(model.children())).eval()
    before, generator = fingerprint(model), torch.get_rng_state()
    stn_fx.transform(model, MODELS[name].hparams, MODELS[name].inputs(3))
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_failing_transform_leaves_the_model_as_it_was() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.norm, self.layer = nn.Dropout(0.1), nn.BatchNorm1d(4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layer(self.norm(self.drop(x)))
            return x if x.sum() > 0 else -x

    model = Failing()
    model.norm.eval()
    before, generator = fingerprint(model), torch.get_rng_state()
    with pytest.raises(stn_fx.errors.StnError):
        stn_fx.transform(model, "dropout", (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),))
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), generator)
