"""The examples of integration run as they stand, at a tiny size. Those of other packages are skipped without them."""

import ast
import json
import os
import subprocess
import sys
import warnings
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

import stn_fx
from stn_fx.bilevel import DeltaSTN
from stn_fx.errors import InputError

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_loop(capsys):
    values = example("own_loop").main(epochs=3, examples=240)
    assert set(values) == {"dropout.2", "weight_decay"}
    assert values["dropout.2"] != pytest.approx(0.1, abs=1e-4), "no outer step moved it"
    assert "epoch 3" in capsys.readouterr().out


def test_hugging_face():
    pytest.importorskip("transformers")
    values = example("hugging_face").main(epochs=2, count=200)
    assert set(values) == {"dropout", "weight_decay"}
    assert values["dropout"] != pytest.approx(0.1, abs=1e-4)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_torchrun(tmp_path):
    """As the README says it: every process ends with the same values, and the first one writes the folder."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "torchrun.py"), str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(told) == 2
    assert told[0] == told[1] == json.loads((tmp_path / "values.json").read_text())["values"]


def test_the_example_for_torchrun_runs_alone(tmp_path):
    assert set(example("torchrun").main(str(tmp_path), epochs=2, examples=240)) == {"dropout.2", "weight_decay"}


@pytest.fixture
def lightning():
    with warnings.catch_warnings():  # its own imports and its advice about workers and devices
        warnings.simplefilter("ignore")
        pytest.importorskip("lightning")
        yield


def test_lightning(lightning, tmp_path):
    values = example("lightning_trainer").main(epochs=3, examples=240, folder=str(tmp_path))
    assert values["dropout.2"] != pytest.approx(0.1, abs=1e-4)
    assert list(tmp_path.glob("*.ckpt"))


def lightning_run(folder, epochs, resume=None):
    """A Lightning run of a model without dropout inserted anew; the module afterwards."""
    from lightning.pytorch import Trainer

    from stn_fx.bilevel.lightning import TunedLightningModule

    torch.manual_seed(0)
    x = torch.randn(64, 6)
    batches = list(zip(x.split(16), (x[:, 0] > 0).long().split(16), strict=True))
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2))
    stn = stn_fx.transform(model, "dropout,weight_decay", (x[:4],), seed=0)
    valid = [(x + 0.1, y) for x, y in batches]
    module = TunedLightningModule(stn, valid, train_steps=2)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
                      enable_model_summary=False, default_root_dir=folder, log_every_n_steps=1)  # fmt: skip
    loaders = (torch.utils.data.DataLoader(each, batch_size=None) for each in (batches, valid))
    trainer.fit(module, *loaders, ckpt_path=resume, **({"weights_only": False} if resume else {}))
    return trainer, module, batches, valid


def test_lightning_makes_the_steps_of_an_own_loop(lightning, tmp_path):
    trainer, module, batches, valid = lightning_run(tmp_path, 3)
    assert trainer.global_step == 12
    torch.manual_seed(0)
    torch.randn(64, 6)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2))
    stn = stn_fx.transform(model, "dropout,weight_decay", (batches[0][0][:4],), seed=0)
    steps, outer = DeltaSTN(stn), 0
    for i in range(12):
        steps.inner_step(batches[i % 4])
        if i >= 4 and i % 2 == 1:
            steps.outer_step(valid[outer % 4])
            outer += 1
    assert module.stn.hparams.values() == stn.hparams.values()
    assert all(torch.equal(a, b) for a, b in zip(module.stn.parameters(), stn.parameters(), strict=True))


@pytest.mark.parametrize("epochs", [1, 2])
def test_lightning_goes_on_from_its_checkpoint(lightning, tmp_path, epochs):
    trainer, *_ = lightning_run(tmp_path, epochs)
    path = tmp_path / "at.ckpt"
    trainer.save_checkpoint(path)
    (_, whole, *_), (_, resumed, *_) = lightning_run(tmp_path, 4), lightning_run(tmp_path, 4, resume=path)
    assert resumed._inner == whole._inner == 16
    assert resumed.stn.hparams.values() == whole.stn.hparams.values()
    assert all(torch.equal(a, b) for a, b in zip(whole.stn.parameters(), resumed.stn.parameters(), strict=True))


def test_several_processes_are_refused(lightning):
    from stn_fx.bilevel.lightning import TunedLightningModule

    stn = stn_fx.transform(torch.nn.Linear(3, 2), "weight_decay", (torch.randn(4, 3),))
    module = TunedLightningModule(stn, [])
    module._trainer = type("Trainer", (), {"world_size": 2, "scaler": None})()
    with pytest.raises(InputError, match="torchrun"):
        module.configure_optimizers()
