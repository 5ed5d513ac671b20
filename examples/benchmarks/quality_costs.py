"""What the steps of each method cost, in training updates of the plain model."""

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from quality_tasks import WITHOUT_BATCH_NORMS, Task
from quality_training import Cost, sgd
from quality_tuners import MEASURED, RESPONSES
from rich.console import Console
from step_cost import DoubleBackwardUpdate

from stn_fx.bilevel import FixedHyperparameters
from stn_fx.data import ImageBatches
from stn_fx.data.batches import Normalisation

REPETITIONS = 15


def measure_costs(task: Task, data: Path, console: Console) -> dict[str, Cost]:
    """Medians of the ratios within each of many interleaved repetitions, on one thread."""
    torch.set_num_threads(1)
    splits = task.splits(data)
    batch = next(iter(ImageBatches(splits.train, Normalisation.of(splits.train), task.batch_size)))
    plain = FixedHyperparameters(task.wrapped(splits, 0), base_optimizer=sgd(task))
    calls: dict[str, Callable[[], object]] = {"plain": lambda: plain.inner_step(batch)}
    for name, build in MEASURED.items():
        algorithm = build(task, task.wrapped(splits, 0, RESPONSES.get(name, "rowwise")))
        calls[f"{name} inner"] = lambda a=algorithm: a.inner_step(batch)
        calls[f"{name} outer"] = lambda a=algorithm: a.outer_step(batch)
    if task.name == WITHOUT_BATCH_NORMS:
        double = DoubleBackwardUpdate(task.build(), task.hparams, batch[0])
        calls["double_backward inner"] = lambda: double(*batch)
        calls["double_backward outer"] = calls["delta_stn outer"]
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    with console.status(f"measuring the steps of {task.name}"):
        for repetition in range(REPETITIONS + 2):
            for name in order.sample(list(calls), len(calls)):
                start = time.perf_counter()
                calls[name]()
                if repetition >= 2:
                    seconds[name].append(time.perf_counter() - start)

    def ratio(name: str) -> float:
        pairs = zip(seconds[name], seconds["plain"], strict=True)
        return round(statistics.median(value / base for value, base in pairs), 3)

    names = [name.removesuffix(" inner") for name in calls if name.endswith(" inner")]
    costs = {name: Cost(ratio(f"{name} inner"), ratio(f"{name} outer")) for name in names}
    console.print(task.name, costs)
    return costs
