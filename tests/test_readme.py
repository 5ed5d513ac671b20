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


def test_own_loop_moves_the_hyperparameters() -> None:
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(first_example().split("trainer = ")[0], "README.md", "exec"), names)
    before = names["stn"].hparams.values()
    (loop,) = [block for block in README.split("```python\n")[1:] if "steps = stn_fx.DeltaSTN(" in block]
    exec(compile(loop.split("```", 1)[0], "README.md", "exec"), names)
    assert all(value != before[name] for name, value in names["stn"].hparams.values().items() if "cutout" not in name)


@pytest.mark.parametrize("name", stn_fx.__all__)
def test_public_names_are_there(name: str) -> None:
    assert hasattr(stn_fx, name)
