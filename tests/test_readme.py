"""The README's first example runs as it stands, and its public names are there."""

from pathlib import Path

import pytest
import torch

import stn_fx

README = (Path(__file__).parents[1] / "README.md").read_text()


def first_example() -> str:
    return README.split("```python\n", 1)[1].split("```", 1)[0]


def test_first_example_runs_and_gives_back_the_users_model(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(first_example(), "README.md", "exec"), names)
    assert names["plain"] is names["model"]
    assert set(names["result"].values) == set(names["stn"].hparams.names)
    assert "dropout.layer1.0" in capsys.readouterr().out


@pytest.mark.parametrize("name", stn_fx.__all__)
def test_public_names_are_there(name: str) -> None:
    assert hasattr(stn_fx, name)
