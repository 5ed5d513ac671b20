"""Does tuning pay? The README's main job over several seeds, from a good start and from a bad one.

    python examples/benchmarks/digits.py
    python examples/benchmarks/digits.py --starts bad --seeds 0 1 2 --out digits.csv

A small Vision Transformer of timm learns scikit-learn's digits from 359 training images, so few that regularization
matters. For each start and seed it is trained with tuning and, from the same weights and in the same order, at the
fixed start values for the same number of epochs. Both are read at their epoch with the lowest validation loss; also
told is the validation loss of the last epoch. An epoch costs more time with tuning, which is told too.
"""

import argparse
import csv
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Adam

from stn_fx.bilevel.comparison import Recipe, Run
from stn_fx.bilevel.image_task import ImageTask
from stn_fx.bilevel.response_step import usual_step
from stn_fx.bilevel.schedules import cosine
from stn_fx.data import load_images, split_images
from stn_fx.model_reference import load_model

STARTS = {
    "good": "dropout(shared),cutout,weight_decay",
    "bad": "dropout(shared, initial=0.5),cutout,weight_decay",
}
MODEL = "timm:test_vit"
ARGUMENTS = {"img_size": 8, "patch_size": 2, "depth": 3}
SIDE = 8
VALID_FRACTION = 0.4
BATCH_SIZE = 32
EPOCHS = 100
LEARNING_RATE = 3e-3
TRAIN_STEPS, RESPONSE_EVERY = 3, 2
"""More often than by default: a run has 1,100 updates only."""


@dataclass(frozen=True)
class Row:
    """Losses of one start, seed and way of training."""

    start: str
    seed: int
    way: str
    valid_loss: float
    last_valid_loss: float
    test_loss: float
    test_accuracy: float | None
    seconds: float

    @staticmethod
    def of(start: str, seed: int, way: str, run: Run) -> "Row":
        """Read a finished run."""
        last = run.result.history[-1].valid_loss
        return Row(start, seed, way, run.valid.loss, last, run.test.loss, run.test.accuracy, run.seconds)


def digits_task(hparams: str) -> ImageTask:
    """The task of the README's main job."""
    source = load_images("digits")
    splits = split_images(source.train, source.test, source.classes, VALID_FRACTION).resized(SIDE)

    def build() -> nn.Module:
        return load_model(MODEL, len(splits.classes), splits.train.channels, ARGUMENTS).model

    return ImageTask(build, splits, hparams, batch_size=BATCH_SIZE)


def recipe(epochs: int, warmup_epochs: int | None = None) -> Recipe:
    """What the command line does with the options of the README's main job."""
    return Recipe(
        epochs,
        warmup_epochs,
        train_steps=TRAIN_STEPS,
        options={
            "base_optimizer": partial(Adam, lr=LEARNING_RATE),
            "response_optimizer": partial(Adam, lr=LEARNING_RATE),
            "response_step": usual_step(RESPONSE_EVERY),
        },
        schedule=cosine,
    )


def table(rows: list[Row]) -> Table:
    """Means over the seeds."""
    summary = Table(title="means over the seeds, at the epoch with the lowest validation loss", title_justify="left")
    for column in ("start", "run", "valid loss", "(std)", "at the last epoch", "test loss", "test accuracy", "seconds"):
        summary.add_column(column, justify="left" if column in ("start", "run") else "right")
    for start in dict.fromkeys(row.start for row in rows):
        for way in dict.fromkeys(row.way for row in rows):
            chosen = [row for row in rows if (row.start, row.way) == (start, way)]
            if chosen:
                valid = [row.valid_loss for row in chosen]
                summary.add_row(
                    start,
                    way,
                    f"{statistics.mean(valid):.4f}",
                    f"{statistics.stdev(valid):.4f}" if len(valid) > 1 else "-",
                    f"{statistics.mean(row.last_valid_loss for row in chosen):.4f}",
                    f"{statistics.mean(row.test_loss for row in chosen):.4f}",
                    f"{statistics.mean(row.test_accuracy or 0 for row in chosen):.1%}",
                    f"{statistics.mean(row.seconds for row in chosen):.0f}",
                )
    return summary


def main() -> None:
    """Parse, run, print; rows reach the file as soon as there are any, so that an interrupted run is not lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--warmup", type=int, help="epochs before tuning begins; else the default, 40 of 100")
    parser.add_argument("--threads", type=int, default=1, help="batches this small gain little from more")
    parser.add_argument("--out", type=Path, help="CSV file of all runs")
    options = parser.parse_args()

    # With another number sums are taken in another order, and in tens of epochs rounding becomes another run.
    torch.set_num_threads(options.threads)
    console, rows = Console(), []
    for start in options.starts:
        task = digits_task(STARTS[start])
        for seed in options.seeds:
            for way, train in (("tuned", task.tuned), ("fixed", task.fixed)):
                row = Row.of(start, seed, way, train(recipe(options.epochs, options.warmup), seed))
                rows.append(row)
                console.print(f"{start} start, seed {seed}, {way}: validation loss {row.valid_loss:.4f}")
                if options.out:
                    write(options.out, rows)
    console.print(table(rows))


def write(path: Path, rows: list[Row]) -> None:
    """All rows so far."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(Row.__annotations__))
        writer.writeheader()
        writer.writerows(vars(row) for row in rows)


if __name__ == "__main__":
    main()
