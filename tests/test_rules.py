"""One conformance test: every rule against the oracles, for both response structures and several batch sizes."""

from pathlib import Path

import pytest
from oracles import (
    EVERY_ORACLE,
    Subject,
    assert_response_pass,
    assert_sites,
    assert_unchanged,
    conditioned_share,
    unconditioned,
)
from rule_cases import CASES, DEFAULT, Case

import stn_fx
from stn_fx.rules import load_builtin_rules

RESPONSES = {"row-wise": "rowwise", "two terms": stn_fx.RowWise(2), "low-rank": stn_fx.LowRank(2)}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch loops where vmap has no rule: bilinear
@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("each", CASES, ids=lambda each: each.name)
def test_rule(each: Case, response: str) -> None:
    subject = Subject(each.build, each.inputs, each.hparams, RESPONSES[response], **each.options)
    assert conditioned_share(subject.stn) == 1.0, list(unconditioned(subject.stn))
    _assert_that_the_case_is_what_it_says(each, subject)
    for oracle in EVERY_ORACLE if each.tangents else (assert_unchanged, assert_response_pass):
        for batch in (2, 5):
            oracle(subject, batch)
    if each.hparams != DEFAULT:
        assert_sites(subject, 4)


def _assert_that_the_case_is_what_it_says(each: Case, subject: Subject) -> None:
    registry = load_builtin_rules()
    graphs = [analysed.captured.graph for analysed in subject.stn.compiled.analysed.values()]
    found = {type(registry.find(node)).__name__ for graph in graphs for node in graph.nodes}
    assert set(each.rules) <= found, set(each.rules) - found
    assert set(each.structures) <= {plan.structure for plan in subject.stn.compiled.plan.parameters}


ELSEWHERE = {
    "ActivationTapRule": "test_activation_terms.py",
    "OwnAugmentationRule": "test_torchvision_transforms.py",
    "WeightDropRule": "test_weight_drop.py",
}
"""Rules for what is inserted or tuned in its place only, with oracles of their own."""


def test_every_rule_has_a_case() -> None:
    covered = {name for each in CASES for name in each.rules} | ELSEWHERE.keys()
    assert all((Path(__file__).parent / file).is_file() for file in ELSEWHERE.values())
    registered = {type(rule).__name__ for rule in load_builtin_rules().rules()}
    assert registered <= covered, f"rules without a case in rule_cases.py: {registered - covered}"


def test_case_names_are_distinct() -> None:
    assert len({each.name for each in CASES}) == len(CASES)
