"""`stn-fx hparams` lists the catalogue, and what a model offers of it."""

import pytest
from stn_fx_cli.main import app
from typer.testing import CliRunner

from stn_fx.hparams import CATALOGUE

TOKENS = """
import torch
from torch import nn
model = nn.Sequential(nn.Embedding(9, 4), nn.Dropout(0.1), nn.Flatten(), nn.Linear(20, 2))
example_inputs = (torch.randint(9, (3, 5)),)
"""


def run(*arguments, columns=200):
    result = CliRunner().invoke(app, ["hparams", *arguments], env={"COLUMNS": str(columns)})
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize("columns", [80, 200])
def test_the_catalogue_is_listed_with_ranges_and_sources(columns):
    code, text = run(columns=columns)
    assert code == 0
    for entry in CATALOGUE:
        assert entry.name in text
    assert "dropout 0 to 0.95; start the site's own rate, else 0.05; scale 0.5 probability that an element" in text
    assert "arXiv 1708.04552" in text
    assert "locked:" in text


def test_what_a_model_offers():
    code, text = run("torchvision:resnet18", "--input-shape", "3,32,32")
    assert code == 0
    assert "layer1.0, layer1.1" in text
    assert "hue 1 input" in text or "hue 1 x" in text
    assert "word_dropout does not fit: there is no token input" in text


@pytest.mark.parametrize("name", ["word_dropout", "weight_decay", "dropout 1 1"])
def test_what_a_token_model_offers(tmp_path, name):
    (tmp_path / "words.py").write_text(TOKENS)
    code, text = run(str(tmp_path / "words.py"))
    assert code == 0
    assert name in text
    assert "rotation does not fit: there is no image input" in text
