"""The long benchmark `examples/benchmarks/quality.py` on a task of seconds: budgets, resumption, the report."""

import csv
import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from torch import nn

from stn_fx.bilevel import BilevelTrainer
from stn_fx.bilevel.trainer import usual_warmup

optuna = pytest.importorskip("optuna", reason="the searches of the benchmark need optuna (extra `benchmarks`)")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))

import quality_costs  # noqa: E402
import quality_methods  # noqa: E402
from quality_costs import measure_costs  # noqa: E402
from quality_report import read_chains, summarize, write_report  # noqa: E402
from quality_tasks import FASHION  # noqa: E402
from quality_training import Cost, Way  # noqa: E402
from quality_tuners import TUNERS, VARIANTS  # noqa: E402

optuna.logging.set_verbosity(optuna.logging.ERROR)

COSTS = {
    "delta_stn": Cost(2.5, 1.0),
    "part_of_batch": Cost(1.9, 0.0),
    "stn": Cost(1.8, 1.0),
    "low_rank": Cost(2.2, 1.0),
    "two_terms": Cost(2.9, 1.1),
    "shared_forward": Cost(2.2, 1.0),
    "double_backward": Cost(4.0, 1.0),
}


def tiny_model():
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 3))


@pytest.fixture
def data(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (90, 8, 8), dtype=np.uint8), np.arange(90) % 3
    (tmp_path / "tiny").mkdir()
    np.savez(tmp_path / "tiny" / "tiny.npz", x_train=images, y_train=labels, x_test=images[:9], y_test=labels[:9])
    task = replace(
        FASHION,
        name="tiny",
        data="tiny",
        build=tiny_model,
        hparams="dropout(shared)",
        starts={"published": {"dropout": 0.1}, "half": {"dropout": 0.5}},
        examples=80,
        plain_epochs=3,
        learning_rate=0.1,
        batch_size=16,
    )
    monkeypatch.setattr(quality_methods, "TASKS", {"tiny": task})
    monkeypatch.setattr(quality_methods, "WITH_VARIANTS", "tiny")
    for module in (quality_methods, quality_costs):
        monkeypatch.setattr(module, "WITHOUT_BATCH_NORMS", "tiny")
    quality_methods._splits.cache_clear()
    return tmp_path


def perform(job, data):
    quality_methods.perform(job, data / "out", data, COSTS)
    return [json.loads(path.read_text()) for path in sorted((data / "out" / job.folder).glob("*.json"))]


@pytest.mark.parametrize("warmup", [0.0, 0.4])
def test_a_budget_buys_as_many_epochs_as_it_pays_for(warmup):
    way = Way(lambda stn: None, Cost(2.5, 1.25), warmup=warmup, valid_batch=256)
    epochs = way.epochs(FASHION, 66, 3.5)

    def price(epochs):
        warm = way.warmup_epochs(epochs, 66) * 66
        rounds = sum(inner % 5 == 0 for inner in range(warm + 1, epochs * 66 + 1))
        return epochs * 66 * 2.5 + rounds * 1.25 * 2

    assert price(epochs) <= 3.5 * 30 * 66 < price(epochs + 1)


def test_all_methods_run_within_their_budgets_and_the_report_has_them(data, monkeypatch):
    monkeypatch.setattr(quality_methods, "POOL", 10)
    monkeypatch.setattr(quality_methods, "SEEDS", (0, 1))
    jobs = quality_methods.jobs(["tiny"], list(quality_methods.METHODS))
    for job in jobs:
        runs = perform(job, data)
        spent = sum(run["curve"][-1][0] for run in runs)
        if job.method in ("tpe", "asha"):
            assert spent == pytest.approx(10)
            assert max(len(run["curve"]) for run in runs) == 3
        elif job.method == "random":
            assert spent == pytest.approx(1)
        else:
            assert spent <= 3.5
            assert runs[0]["valid_loss"] == min(loss for _, loss in runs[0]["curve"])
    assert len(list((data / "out" / "tiny" / "asha" / "seed0").glob("*.json"))) > 10  # some were stopped early
    write_report(data / "out", ["tiny"], Console(quiet=True))
    with (data / "out" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["method"], row["plain_runs"]) for row in rows} >= {("random", "1"), ("tpe", "3"), ("delta_stn", "3.5")}
    for name in ("curves.csv", "trajectories.csv", "curves.png", "trajectories-tiny.png"):
        assert (data / "out" / name).stat().st_size > 0
    best = min(rows, key=lambda row: float(row["valid_loss"]))
    chains = read_chains(data / "out", ["tiny"])
    assert float(best["valid_loss"]) == pytest.approx(min(row["valid_loss"] for row in summarize(chains)))


@pytest.mark.parametrize("method", ["tpe", "asha"])
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(data, method):
    job = quality_methods.Job("tiny", method, "", 0)
    whole = perform(job, data)
    files = sorted((data / "out" / job.folder).glob("*.json"))
    for path in files[4:]:
        path.unlink()
    again = perform(job, data)
    for one in (*whole, *again):
        one.pop("seconds")
    assert again == whole


def test_an_unfinished_search_has_no_row_of_a_budget_that_it_has_not_spent(data):
    job = quality_methods.Job("tiny", "tpe", "", 0)
    perform(job, data)
    for path in sorted((data / "out" / job.folder).glob("*.json"))[4:]:
        path.unlink()
    assert [row["plain_runs"] for row in summarize(read_chains(data / "out", ["tiny"]))] == [1, 3]


def test_results_of_another_search_are_refused(data):
    job = quality_methods.Job("tiny", "tpe", "", 0)
    perform(job, data)
    path = min((data / "out" / job.folder).glob("*.json"))
    path.write_text(path.read_text().replace('"dropout": 0.', '"dropout": 0.0', 1))
    with pytest.raises(SystemExit, match="another search"):
        perform(job, data)


def test_costs_are_measured_for_everything_that_is_computed_from_them(data):
    costs = measure_costs(quality_methods.TASKS["tiny"], data, Console(quiet=True))
    assert costs.keys() == COSTS.keys()
    inner = {name: tuner(FASHION, COSTS).cost.inner for name, tuner in (TUNERS | VARIANTS).items()}
    assert inner["papers"] == inner["every_second"] == COSTS["delta_stn"].inner
    assert inner["every_second"] - 1 == 2 * (inner["frequent"] - 1) == 4 * (inner["every_eighth"] - 1)
    assert inner["half_batch"] == inner["every_eighth"] < inner["low_rank"] < inner["frequent"] < inner["stn"]
    assert inner["delta_stn"] - 1 == pytest.approx(0.5 * (COSTS["part_of_batch"].inner - 1))


def test_delta_stn_has_the_defaults_of_the_trainer() -> None:
    parameters = inspect.signature(BilevelTrainer.fit).parameters
    way = TUNERS["delta_stn"](FASHION, COSTS)
    assert way.train_steps == parameters["train_steps"].default
    assert way.warmup_epochs(50, 33) == usual_warmup(50, 33)


def test_double_backward_is_left_out_where_there_are_batch_norms() -> None:
    tasks = {job.task for job in quality_methods.jobs(["fashion", "cifar"], ["double_backward"])}
    assert tasks == {"fashion"}
