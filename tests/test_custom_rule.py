"""`examples/custom_rule.py` runs, is short, and its rule is right."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from oracles import EVERY_ORACLE, Subject
from rule_cases import noise
from torch import nn

import stn_fx

EXAMPLE = Path(__file__).parents[1] / "examples" / "custom_rule.py"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


def test_the_example_is_short_and_conditions_everything(names: dict[str, Any]) -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 60
    report = names["stn"].report
    assert report.conditioned_share == 1.0
    assert {row.name: row.rule for row in report.parameters}["1.a"] == "snake"
    assert not report.notes


def test_without_the_rule_the_report_says_what_is_lost(names: dict[str, Any]) -> None:
    stn = stn_fx.transform(names["stn"].model, "weight_decay", stn_example := (names["torch"].randn(4, 8),))
    assert set(stn.report.unconditioned) == {"1.a"}
    assert "examples.snake" in stn.report.unconditioned["1.a"]
    assert any("central differences: examples.snake" in note for note in stn.report.notes)
    assert stn.respond(*stn_example).shape == (4, 16)


@pytest.mark.parametrize("with_rule", [True, False])
def test_check_does_not_trust_forward_mode_through_it(names: dict[str, Any], with_rule: bool) -> None:
    """Forward mode is a silent zero through a custom operator."""
    rules = {"rules": names["rules"]} if with_rule else {}
    x = names["torch"].randn(4, 8)
    checked = stn_fx.check(stn_fx.transform(names["stn"].model, "weight_decay", (x,), **rules), x)
    assert checked.passed, checked
    assert {o.note for o in checked.oracles if o.name in ("linearized pass", "training graph")} == {
        "judged by central differences"
    }


@pytest.mark.parametrize("response", ["rowwise", stn_fx.LowRank(2)], ids=["row-wise", "low-rank"])
def test_the_rule_is_right(names: dict[str, Any], response: Any) -> None:
    class Formula(names["Snake"]):
        """For the judge, which needs forward mode."""

        def forward(self, x):
            return names["formula"](x, self.a)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 6), names["Snake"](6), nn.Dropout(0.1), nn.Linear(6, 3))

    def judge(model: nn.Module) -> nn.Module:
        model[1].__class__ = Formula
        return model

    subject = Subject(
        build, noise(4, 8), "dropout,weight_decay", response, plain=judge, options={"rules": names["rules"]}
    )
    for oracle in EVERY_ORACLE:
        for batch in (2, 5):
            oracle(subject, batch)
