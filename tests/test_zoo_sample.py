"""A sample of the zoo benchmark: models that together use every rule for an operator of a model.

The whole zoo is `python examples/benchmarks/zoo.py`; here as there a model passes if the oracles hold in float64 and at
least 95 % of its scalars are conditioned.
"""

import sys
from pathlib import Path
from typing import Any

import pytest

import stn_fx
from stn_fx.rules import load_builtin_rules

pytest.importorskip("transformers", reason="the zoo's models need transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))

import zoo_measure
from zoo_models import entries

SAMPLE: dict[tuple[str, str], set[str]] = {
    ("own", "simple cnn"): {"ConvolutionRule", "LinearInInputRule", "LinearRule", "MaxPoolRule", "ReluRule"},
    ("own", "autoencoder"): {"TransposedConvolutionRule", "PointwiseRule"},
    ("own", "weight norm and spectral norm"): {"DetachRule", "ProductRule"},
    ("own", "lstm language model, sequence first"): {"RecurrentRule", "EmbeddingRule", "JoinRule"},
    ("own", "attention by hand"): {"CopyRule", "InstanceNormRule", "MatmulRule", "RMSNormRule", "SoftmaxRule"},
    ("transformers", "gpt2 lm"): {"AddmmRule", "AttentionRule", "DropoutRule", "DropPathRule", "LayerNormRule"},
    ("transformers", "t5 lm"): {"WhereRule", "SumRule"},
    ("transformers", "swin classifier"): {"ShiftedRule"},
    ("transformers", "wav2vec2 classifier"): {"GroupNormRule"},
    ("timm", "test_resnet"): {"BatchNormRule"},
    ("timm", "test_vit"): {"AttentionRule", "JoinRule"},
    ("torchvision", "squeezenet1_1"): {"ConvolutionRule", "JoinRule"},
}
"""Library and model, and rules that it is here for."""

OTHER_RULES = {
    "ColourRule", "CustomRule", "CutoutRule", "FloatingInputRule", "GaussianBlurRule", "GeometryRule", "NoiseRule",
    "OpaqueRule", "RandomErasingRule", "SpanMaskingRule", "WordDropoutRule", "ActivationTapRule", "OwnAugmentationRule",
    "WeightDropRule",
}  # fmt: skip
"""For what stn_fx inserts or leaves as it is; no model has these operators."""


@pytest.mark.parametrize(("library", "model"), SAMPLE, ids=[f"{library}-{model}" for library, model in SAMPLE])
def test_it_passes(library: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = [each for each in entries(library) if each.name == model]
    converted: list[stn_fx.SelfTuningModule] = []
    transform = stn_fx.transform
    monkeypatch.setattr(stn_fx, "transform", lambda *args, **options: _kept(transform(*args, **options), converted))
    rows: list[dict[str, Any]] = []
    zoo_measure.measure(entry, False, rows.append)
    assert rows[-1]["verdict"] == "pass", rows[-1]
    compiled = converted[-1].compiled
    nodes = [node for each in compiled.analysed.values() for node in each.captured.graph.nodes]
    assert SAMPLE[library, model] <= {type(compiled.registry.find(node)).__name__ for node in nodes}


def _kept(stn: stn_fx.SelfTuningModule, converted: list[stn_fx.SelfTuningModule]) -> stn_fx.SelfTuningModule:
    converted.append(stn)
    return stn


def test_the_sample_uses_every_rule() -> None:
    registered = {type(rule).__name__ for rule in load_builtin_rules().rules()}
    assert set().union(*SAMPLE.values()) == registered - OTHER_RULES
