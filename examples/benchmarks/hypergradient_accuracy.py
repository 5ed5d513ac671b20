"""How exact is the hypergradient while a model trains?  Against runs retrained around the current hyperparameters.

    python examples/benchmarks/hypergradient_accuracy.py                        # scikit-learn's digits
    python examples/benchmarks/hypergradient_accuracy.py --epochs 20 --looks 2 --seeds 4

A SimpleCNN trains with tuning.  At some epochs it stops for a look: the hypergradient is taken on the whole validation
set, and for every hyperparameter several pairs of ordinary runs go on from the same weights, the one at a raw value
above the current one, the other below.  The two of a pair meet the same batches and draw the same masks.  Their
difference in validation loss is what the hypergradient predicts; the cosine says how well the directions agree.  The
differences are noisy too: the cosine between the means of two halves of the pairs says how well they agree among
themselves, and no method can agree with them much better than that.
"""

import argparse
import copy
import csv
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from response_noise import hypergradient
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from simple_cnn import SimpleCNN
from torch import Tensor
from torch.optim import SGD, RMSprop

import stn_fx
from stn_fx.bilevel import DeltaSTN, FixedHyperparameters
from stn_fx.bilevel.evaluation import evaluate
from stn_fx.data import ImageBatches, Splits, load_images, split_images
from stn_fx.data.batches import Normalisation

HPARAMS = "dropout,gaussian_noise,weight_decay"
BATCH_SIZE, EVALUATION = 64, 500
VALID_FRACTION = 0.4
HYPER_RATE = 0.02


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    splits: Splits
    rate: float

    def batches(self, part: str, size: int, seed: int | None = None) -> ImageBatches:
        """Batches of one part of the data, in a random order if there is a seed."""
        normalisation, shuffle = Normalisation.of(self.splits.train), seed is not None
        return ImageBatches(
            getattr(self.splits, part), normalisation, size, shuffle=shuffle, drop_last=shuffle, seed=seed or 0
        )

    def wrapped(self, seed: int) -> stn_fx.SelfTuningModule:
        """A new model, the same for every seed; masks and perturbations differ."""
        torch.manual_seed(0)
        splits = self.splits
        model = SimpleCNN(splits.train.channels, splits.train.size[0], len(splits.classes), rate=0.2)
        return stn_fx.transform(model, HPARAMS, (next(iter(self.batches("train", 2)))[0],), seed=seed)

    def optimizer(self) -> partial[SGD]:
        """Of the weights."""
        return partial(SGD, lr=self.rate, momentum=0.9)


class Retraining:
    """Validation losses of ordinary runs that go on from a state of another run.

    Args:
        setting: model and data.
        epochs: of each run; its loss is the mean over the last third of them.
    """

    def __init__(self, setting: Setting, epochs: int) -> None:
        self.setting, self.epochs = setting, epochs
        self.stn = setting.wrapped(0)
        self.steps = FixedHyperparameters(self.stn, base_optimizer=setting.optimizer())

    def loss(self, tuned: DeltaSTN, raw_H: Tensor, seed: int) -> float:
        """At these raw hyperparameters; the seed decides about the order of the data and all masks."""
        stn = self.stn
        stn.model.load_state_dict(tuned.stn.model.state_dict())
        self.steps.optimizers["base"].load_state_dict(copy.deepcopy(tuned.optimizers["base"].state_dict()))
        with torch.no_grad():
            stn.hparams.raw.copy_(raw_H)
        stn.generator().manual_seed(seed)
        training, losses = self.setting.batches("train", BATCH_SIZE, seed), []
        for epoch in range(self.epochs):
            for batch in training:
                self.steps.inner_step(batch)
            if epoch >= self.epochs - max(1, self.epochs // 3):
                losses.append(evaluate(stn, F.cross_entropy, self.setting.batches("valid", EVALUATION)).loss)
        return statistics.fmean(losses)


@dataclass(frozen=True)
class Look:
    """What was found at one epoch.

    Attributes:
        epoch: of the run that tunes.
        values: of the hyperparameters there.
        predicted_H: hypergradient of the response, by raw hyperparameters.
        found_SH: differences between retrained runs, one row for each seed.
    """

    epoch: int
    values: dict[str, float]
    predicted_H: Tensor
    found_SH: Tensor

    @property
    def cosine(self) -> float:
        """Between the hypergradient and the mean of the differences."""
        return F.cosine_similarity(self.predicted_H, self.found_SH.mean(0), dim=0).item()

    @property
    def between_halves(self) -> float:
        """Cosine between the means of two halves of the differences."""
        return F.cosine_similarity(self.found_SH[::2].mean(0), self.found_SH[1::2].mean(0), dim=0).item()

    def rows(self) -> list[dict[str, float | str]]:
        """One for each hyperparameter."""
        errors_H = self.found_SH.std(0) / len(self.found_SH) ** 0.5
        columns = (self.predicted_H.tolist(), self.found_SH.mean(0).tolist(), errors_H.tolist())
        return [
            {
                "epoch": self.epoch,
                "hyperparameter": name,
                "value": value,
                "predicted": predicted,
                "retrained": retrained,
                "standard_error": error,
            }
            for (name, value), predicted, retrained, error in zip(self.values.items(), *columns, strict=True)
        ]


def look(
    steps: DeltaSTN,
    setting: Setting,
    retraining: Retraining,
    epoch: int,
    seeds: int,
    step: float,
    tick: Callable[[], None],
) -> Look:
    """Hypergradient and pairs of retrained runs at the present state of `steps`; `tick` is called after every pair."""
    stn = steps.stn
    raw_H, found_SH = stn.hparams.raw.detach().clone(), torch.zeros(seeds, len(stn.hparams))
    for seed in range(seeds):
        for index in range(len(raw_H)):
            step_H = torch.zeros_like(raw_H)
            step_H[index] = step
            above, below = (retraining.loss(steps, raw_H + sign * step_H, seed) for sign in (1, -1))
            found_SH[seed, index] = (above - below) / (2 * step)
            tick()
    predicted_H = hypergradient(stn, setting.batches("valid", EVALUATION))
    return Look(epoch, stn.hparams.values(), predicted_H, found_SH)


def train_one_epoch(steps: DeltaSTN, training: ImageBatches, held: Iterator, train_steps: int, done: int) -> int:
    """With an outer step after every `train_steps` inner ones, of which `done` are done; how many are done then."""
    for batch in training:
        steps.inner_step(batch)
        done += 1
        if done % train_steps == 0:
            steps.outer_step(next(held))
    return done


def without_end(batches: ImageBatches) -> Iterator:
    """The batches again and again, each time in another order."""
    while True:
        yield from batches


def main() -> None:
    """Train, look, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="as for stn-fx tune --data")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--looks", type=int, default=6, help="looks, evenly over the epochs")
    parser.add_argument("--retrain", type=int, default=15, help="epochs of each run of a pair")
    parser.add_argument("--seeds", type=int, default=16, help="pairs for each hyperparameter")
    parser.add_argument("--step", type=float, default=0.7, help="of the raw hyperparameters")
    parser.add_argument("--rate", type=float, default=0.03, help="learning rate of the weights")
    parser.add_argument("--train-steps", type=int, default=5, help="inner steps for each outer step")
    parser.add_argument("--out", type=Path, help="CSV file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = load_images(options.data)
    setting = Setting(split_images(source.train, source.test, source.classes, VALID_FRACTION), options.rate)
    sgd = setting.optimizer()
    hyper = partial(RMSprop, lr=HYPER_RATE)
    steps = DeltaSTN(setting.wrapped(1), base_optimizer=sgd, response_optimizer=sgd, hyper_optimizer=hyper)
    retraining = Retraining(setting, options.retrain)
    training, held = setting.batches("train", BATCH_SIZE, 0), without_end(setting.batches("valid", BATCH_SIZE, 0))
    epochs = [options.epochs * (number + 1) // options.looks for number in range(options.looks)]
    looks: list[Look] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        pairs = len(steps.stn.hparams) * options.seeds
        line, done = progress.add_task("pairs of runs", total=len(epochs) * pairs), 0
        for epoch in range(1, options.epochs + 1):
            done = train_one_epoch(steps, training, held, options.train_steps, done)
            if epoch in epochs:
                tick = partial(progress.advance, line)
                looks.append(look(steps, setting, retraining, epoch, options.seeds, options.step, tick))
                progress.console.print(
                    f"epoch {epoch}: cosine {looks[-1].cosine:.2f}, between halves {looks[-1].between_halves:.2f}"
                )
    if options.out:
        rows = [row for each in looks for row in each.rows()]
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    for name in ("cosine", "between_halves"):
        print(f"median {name.replace('_', ' ')}: {statistics.median(getattr(each, name) for each in looks):.2f}")


if __name__ == "__main__":
    main()
