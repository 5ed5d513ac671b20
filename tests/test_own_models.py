"""Models as users write them against the oracles, for both response structures and batches of 1, 2 and 5 examples."""

from typing import Any

import pytest
import torch
from oracles import (
    Subject,
    as_plain_layers,
    assert_base_gradients,
    assert_close,
    assert_gradients,
    assert_linearized_pass,
    assert_response_pass,
    assert_sites,
    assert_training_graph,
    assert_unchanged,
)
from own_models import OWN
from rule_cases import Case, noise
from torch import nn
from torch.nn.utils import parametrizations

import stn_fx

RESPONSES: dict[str, Any] = {
    "row-wise": "rowwise",
    "two terms": stn_fx.RowWise(2),
    "low-rank": stn_fx.LowRank(2),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # nn.Transformer's own words about its default
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # reentrant checkpoints in evaluation
@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("each", OWN, ids=lambda each: each.name)
def test_own_model(each: Case, response: str) -> None:
    subject = Subject(each.build, each.inputs, each.hparams, RESPONSES[response], **each.options)
    plans = subject.stn.compiled.plan.parameters
    # What stands under no_grad is trained no more than what is frozen.
    assert not [p for p in plans if not p.conditioned and p.structure != "frozen" and "behind a detach" not in p.reason]
    assert set(each.structures) <= {plan.structure for plan in plans}
    batch_norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in subject.model.modules())
    for batch in (1, 2, 5):
        # A batch norm over one value per channel is an error in training, the user's model's as ours.
        assert_unchanged(subject, max(batch, 2) if batch_norms else batch)
        assert_base_gradients(subject, max(batch, 2) if batch_norms else batch)
        assert_response_pass(subject, batch)
        if each.tangents:
            assert_linearized_pass(subject, batch)
    if each.tangents:
        assert_training_graph(subject, 2)
        assert_training_graph(subject, 5)
        assert_gradients(subject, 2)
    if not batch_norms:
        assert_sites(subject, 4)


def spectral_model() -> nn.Module:
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(5, 6)),
        nn.Tanh(),
        nn.Dropout(0.2),
        parametrizations.spectral_norm(nn.Linear(6, 3)),
    )


@pytest.mark.parametrize("response", RESPONSES)
def test_spectral_norm(response: str) -> None:
    """Its power iteration moves buffers in training: the evaluation graph has the oracles, training the user's pass."""
    subject = Subject(
        spectral_model, noise(5), "dropout,weight_decay", RESPONSES[response], plain=lambda m: as_plain_layers(m.eval())
    )
    assert "effective" in {plan.structure for plan in subject.stn.compiled.plan.parameters}
    for batch in (1, 2, 5):
        assert_response_pass(subject, batch)
        assert_linearized_pass(subject, batch)
        assert_base_gradients(subject, batch)
    assert_gradients(subject, 2)
    (x,) = subject.inputs(3)
    judge, stn = spectral_model().double(), subject.stn
    judge.load_state_dict(subject.model.state_dict())
    judge[2].p = 0.0
    with torch.no_grad():
        stn.hparams.raw.fill_(-50)
    assert_close([stn.train()(x)], [judge.train()(x)], "base pass with power iterations")
    for name, buffer in judge.named_buffers():
        assert_close([dict(stn.model.named_buffers())[name]], [buffer], name)
    before = {name: buffer.clone() for name, buffer in stn.model.named_buffers()}
    stn.linearize(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in stn.model.named_buffers())
