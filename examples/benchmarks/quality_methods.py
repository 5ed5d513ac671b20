"""The methods of `quality.py` and the jobs that they consist of.

A job is one chain of runs that need each other's results (a search of one seed) or a single run.  Each finished run is
a JSON file, written at once; a job that is started again goes on behind the runs that it finds.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import count
from pathlib import Path

import optuna
import torch
from quality_tasks import TASKS, WITH_VARIANTS, WITHOUT_BATCH_NORMS, Task
from quality_training import Cost, Outcome, Way, sgd, train
from quality_tuners import FROM_ALL_STARTS, NOT_WITH_BATCH_NORMS, TUNERS, VARIANTS

from stn_fx.bilevel import FixedHyperparameters
from stn_fx.bilevel.atomic import write_atomically
from stn_fx.data import Splits

SEEDS = (0, 1, 2)
TRIALS = 10
POOL = 15
"""Random trials that random search is resampled from."""
START_UP_TRIALS = 3
TUNING_BUDGET = 3.5
"""Of every method that tunes in one run, in plain runs."""
INSIDE = 1e-4
"""Searches keep this share of the range away from the bounds, which are reached at infinite raw values only."""
POOL_SEED = 1000


def fixed(task: Task) -> Way:
    """Ordinary training: the unit of compute."""
    return Way(lambda stn: FixedHyperparameters(stn, base_optimizer=sgd(task)), Cost(1.0))


@dataclass(frozen=True)
class Job:
    """One chain of runs.

    Attributes:
        task: name of the task.
        method: name of the method.
        start: name of the starting point; empty where the method has none.
        seed: of everything.
    """

    task: str
    method: str
    start: str
    seed: int

    @property
    def folder(self) -> Path:
        """Below the folder of results."""
        return Path(self.task) / "-".join(filter(None, (self.method, self.start))) / f"seed{self.seed}"


def jobs(tasks: list[str], methods: list[str]) -> list[Job]:
    """All of these methods, those first that others are compared with.

    Three seeds each, on the published start where there is one; from the other starts as many as the task says; one
    seed, on one task only, for most variants.
    """
    found = []
    for task in tasks:
        starts = TASKS[task].starts
        published, *others = starts
        for method in methods:
            start = "" if method in SEARCHES else published
            if method == "random":
                found += [Job(task, method, start, trial) for trial in range(POOL)]
            elif method in VARIANTS and method not in FROM_ALL_STARTS:
                found += [Job(task, method, start, SEEDS[0])] if task == WITH_VARIANTS else []
            elif task == WITHOUT_BATCH_NORMS or method not in NOT_WITH_BATCH_NORMS:
                found += [Job(task, method, start, seed) for seed in SEEDS]
            if method in FROM_ALL_STARTS:
                seeds = SEEDS[: TASKS[task].seeds_elsewhere]
                found += [Job(task, method, start, seed) for start in others for seed in seeds]
    return found


def perform(job: Job, out: Path, data: Path, costs: dict[str, Cost]) -> None:
    """Do what of the job is not done yet."""
    torch.set_num_threads(1)
    task = TASKS[job.task]
    folder = out / job.folder
    folder.mkdir(parents=True, exist_ok=True)
    splits = _splits(job.task, data)
    if job.method in SEARCHES:
        SEARCHES[job.method](task, splits, job, folder)
    elif not (path := folder / "run.json").exists():
        way = fixed(task) if job.method == "fixed" else (TUNERS | VARIANTS)[job.method](task, costs)
        _save(path, train(task, splits, way, job.seed, dict(task.starts[job.start]), TUNING_BUDGET))


@cache
def _splits(task: str, data: Path) -> Splits:
    return TASKS[task].splits(data)


def _distributions(task: Task, splits: Splits) -> dict[str, optuna.distributions.BaseDistribution]:
    """The bounds that tuning has too; discrete hyperparameters are rounded by the model, as for tuning."""
    found: dict[str, optuna.distributions.BaseDistribution] = {}
    for each in task.wrapped(splits, 0).hparams.resolved:
        lowest = task.logarithmic.get(each.entry)
        margin = INSIDE * (each.high - each.low)
        low = each.low + margin if lowest is None else lowest
        found[each.name] = optuna.distributions.FloatDistribution(low, each.high - margin, log=lowest is not None)
    return found


def _random(task: Task, splits: Splits, job: Job, folder: Path) -> None:
    """One trial of the pool."""
    sampler = optuna.samplers.RandomSampler(seed=POOL_SEED + job.seed)
    _search(task, splits, job, folder, sampler, optuna.pruners.NopPruner(), plain_runs=1)


def _tpe(task: Task, splits: Splits, job: Job, folder: Path) -> None:
    """Tree-structured Parzen estimator (Bergstra et al. 2011)."""
    sampler = optuna.samplers.TPESampler(seed=job.seed, n_startup_trials=START_UP_TRIALS)
    _search(task, splits, job, folder, sampler, optuna.pruners.NopPruner(), plain_runs=TRIALS)


def _asha(task: Task, splits: Splits, job: Job, folder: Path) -> None:
    """Asynchronous successive halving (Li et al. 2020) of random trials; stopped ones leave compute for others."""
    sampler = optuna.samplers.RandomSampler(seed=job.seed)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, task.plain_epochs // 9), reduction_factor=3)
    _search(task, splits, job, folder, sampler, pruner, plain_runs=TRIALS)


SEARCHES: dict[str, Callable[[Task, Splits, Job, Path], None]] = {"random": _random, "tpe": _tpe, "asha": _asha}
COMPARED = ("fixed", *SEARCHES, *TUNERS)
METHODS = (*COMPARED, *VARIANTS)


def _search(
    task: Task,
    splits: Splits,
    job: Job,
    folder: Path,
    sampler: optuna.samplers.BaseSampler,
    pruner: optuna.pruners.BasePruner,
    plain_runs: int,
) -> None:
    """Trials until the budget is spent; the search hears of those that are there already as of new ones."""
    distributions = _distributions(task, splits)
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    remaining = plain_runs * task.plain_epochs
    for number in count():
        if remaining <= 0:
            return
        path = folder / f"trial{number:03d}.json"
        trial = study.ask(distributions)
        told = partial(_told, trial)
        if not path.exists():
            # Every trial begins with other weights, as people's trials do.
            seed, most_epochs = 100 * job.seed + number, min(remaining, task.plain_epochs)
            _save(path, train(task, splits, fixed(task), seed, trial.params, 1.0, most_epochs, told))
        else:
            done = json.loads(path.read_text())
            if done["initial"] != trial.params:
                raise SystemExit(f"{path} is of another search. Remove {folder}, or choose another folder.")
            for epoch, (_, loss) in enumerate(done["curve"], start=1):
                told(epoch, loss)
        losses = [loss for _, loss in json.loads(path.read_text())["curve"]]
        remaining -= len(losses)
        study.tell(trial, min(losses))


def _told(trial: optuna.Trial, epoch: int, loss: float) -> bool:
    """Tell the search of an epoch; whether it wants the trial stopped."""
    trial.report(loss, epoch)
    return trial.should_prune()


def _save(path: Path, outcome: Outcome) -> None:
    content = json.dumps(asdict(outcome), indent=1)
    write_atomically(path, lambda temporary: temporary.write_text(content))
