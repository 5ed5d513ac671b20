"""How exact is the hypergradient while a model trains?  Against runs retrained around the current hyperparameters.

    python examples/benchmarks/hypergradient_accuracy.py                        # scikit-learn's digits, about an hour
    python examples/benchmarks/hypergradient_accuracy.py --epochs 20 --looks 2 --seeds 4

A SimpleCNN trains with tuning.  At some epochs it stops for a look: the hypergradient is taken on the whole validation
set, and for every hyperparameter several pairs of ordinary runs go on from the same weights, the one at a raw value
above the current one, the other below.  The two of a pair meet the same batches and draw the same masks.  Their
difference in validation loss is what the hypergradient predicts; the cosine says how well the directions agree.  The
differences are noise too: the cosine between the means of two halves of the pairs says how well they agree among
themselves, and no method can agree with them much better than that.
"""

import argparse
import copy
import csv
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from response_noise import hypergradient
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from simple_cnn import SimpleCNN
from torch import Tensor
from torch.optim import SGD, RMSprop

import stn_fx
from stn_fx.bilevel import DeltaSTN, FixedHyperparameters
from stn_fx.data import ImageBatches, Splits, load_images, split_images
from stn_fx.data.batches import Normalisation

HPARAMS = "dropout,gaussian_noise,weight_decay"
BATCH_SIZE = 64


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
        self.fresh = copy.deepcopy(self.steps.optimizers["base"].state_dict())

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
                losses.append(validation_loss(stn, self.setting))
        return statistics.fmean(losses)


def validation_loss(stn: stn_fx.SelfTuningModule, setting: Setting) -> float:
    """Of the plain model in evaluation mode."""
    stn.model.eval()
    with torch.no_grad():
        parts = [(F.cross_entropy(stn.model(x), y).item(), len(y)) for x, y in setting.batches("valid", 500)]
    stn.model.train()
    return sum(loss * count for loss, count in parts) / sum(count for _, count in parts)


def cosine(first: Tensor, second: Tensor) -> float:
    """Between two gradients."""
    return F.cosine_similarity(first, second, dim=0).item()


def main() -> None:
    """Train, look, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="as for stn-fx tune --data")
    parser.add_argument("--examples", type=int, default=None, help="of the training data, validation included")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--looks", type=int, default=6, help="looks, evenly over the epochs")
    parser.add_argument("--retrain", type=int, default=15, help="epochs of each run of a pair")
    parser.add_argument("--seeds", type=int, default=16, help="pairs for each hyperparameter")
    parser.add_argument("--step", type=float, default=0.7, help="of the raw hyperparameters")
    parser.add_argument("--rate", type=float, default=0.03, help="learning rate of the weights")
    parser.add_argument("--steps", type=int, default=5, help="inner steps for each outer step")
    parser.add_argument("--out", type=Path, help="CSV file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = load_images(options.data)
    splits = split_images(source.train, source.test, source.classes, 0.4, options.examples, seed=0)
    setting = Setting(splits, options.rate)
    steps = DeltaSTN(
        setting.wrapped(1),
        base_optimizer=setting.optimizer(),
        response_optimizer=setting.optimizer(),
        hyper_optimizer=partial(RMSprop, lr=0.02),
    )
    stn, retraining = steps.stn, Retraining(setting, options.retrain)
    training, validation = setting.batches("train", BATCH_SIZE, 0), setting.batches("valid", BATCH_SIZE, 0)
    looks = [options.epochs * (look + 1) // options.looks for look in range(options.looks)]
    rows: list[dict[str, float | str]] = []
    cosines: list[tuple[int, float, float]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        line = progress.add_task("runs", total=len(looks) * len(stn.hparams) * options.seeds * 2)
        held, count = iter(validation), 0
        for epoch in range(1, options.epochs + 1):
            for batch in training:
                steps.inner_step(batch)
                count += 1
                if count % options.steps == 0:
                    if (content := next(held, None)) is None:
                        held = iter(validation)
                        content = next(held)
                    steps.outer_step(content)
            if epoch not in looks:
                continue
            predicted_H = hypergradient(stn, setting.batches("valid", 500))
            raw_H, found = stn.hparams.raw.detach().clone(), torch.zeros(options.seeds, len(stn.hparams))
            for seed in range(options.seeds):
                for index in range(len(stn.hparams)):
                    step_H = torch.zeros_like(raw_H)
                    step_H[index] = options.step
                    above, below = (retraining.loss(steps, raw_H + sign * step_H, seed) for sign in (1, -1))
                    found[seed, index] = (above - below) / (2 * options.step)
                    progress.advance(line, 2)
            halves = cosine(found[::2].mean(0), found[1::2].mean(0))
            cosines.append((epoch, cosine(predicted_H, found.mean(0)), halves))
            errors_H = found.std(0) / options.seeds**0.5
            values = stn.hparams.values()
            for index, name in enumerate(stn.hparams.names):
                rows.append(
                    {
                        "epoch": epoch,
                        "hyperparameter": name,
                        "value": values[name],
                        "predicted": predicted_H[index].item(),
                        "retrained": found[:, index].mean().item(),
                        "standard_error": errors_H[index].item(),
                    }
                )
            progress.console.print(f"epoch {epoch}: cosine {cosines[-1][1]:.2f}, between halves {halves:.2f}")
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    table = Table(title="hypergradients and differences between retrained runs", title_justify="left")
    for column in ("epoch", "cosine", "between halves of the pairs"):
        table.add_column(column, justify="right")
    for epoch, found_cosine, halves in cosines:
        table.add_row(str(epoch), f"{found_cosine:.2f}", f"{halves:.2f}")
    console = Console()
    console.print(table)
    medians = (statistics.median(each[column] for each in cosines) for column in (1, 2))
    console.print("medians: cosine {:.2f}, between halves {:.2f}".format(*medians))


if __name__ == "__main__":
    main()
