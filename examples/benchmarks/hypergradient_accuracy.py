"""How exact is the hypergradient while a model trains?  Against runs that are trained again with other hyperparameters.

    python examples/benchmarks/hypergradient_accuracy.py --data ~/data/fashion-mnist --out accuracy   # half an hour
    python examples/benchmarks/hypergradient_accuracy.py --epochs 10 --seeds 2 --out accuracy         # digits, a minute

A perceptron trains at hyperparameters that stay as they are, with a response beside it that learns as for tuning, and
every few updates the hypergradient is taken as an outer step takes it, on one validation batch with perturbed
hyperparameters, and not followed.  What the responses are compared with: for every hyperparameter pairs of ordinary
runs from the same initial weights, one at a raw value above, the other below, the two with the same batches and masks;
their difference in validation loss is what the hypergradient predicts.  Both are means over a window of epochs, since
a single hypergradient follows the noise of the weights as much as the hyperparameters.

The cosine tells how well the directions agree.  The differences are noisy too: the cosine between the means of two
halves of the pairs says how well they agree among themselves, and no method can agree with them much better than that.
Every finished run is a file in the folder; the same command goes on behind the runs that are done.
"""

import argparse
import csv
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD

import stn_fx
from stn_fx.bilevel import (
    Algorithm,
    BilevelTrainer,
    Callback,
    DeltaSTN,
    EveryKth,
    FitResult,
    FixedHyperparameters,
    Linearized,
    OnFraction,
)
from stn_fx.bilevel.atomic import write_atomically
from stn_fx.bilevel.response_step import EVERY, FRACTION
from stn_fx.data import ImageBatches, Splits, load_images, split_images
from stn_fx.data.batches import Normalisation
from stn_fx.transform import ResponseForm

HPARAMS = "dropout(initial=0.2),gaussian_noise,weight_decay"
WIDTH, BATCH_SIZE, VALID_BATCH = 64, 128, 512
VALID_FRACTION = 0.4
MOMENTUM = 0.9
TRAIN_STEPS = 2


@dataclass(frozen=True)
class Way:
    """How a response learns: its form, its steps, the share of their batches, its rate in units of the weights' one.

    Of each there are several runs, `responses`, with other initial values, perturbations and masks of the response.
    """

    form: ResponseForm = "rowwise"
    every: int = 2
    fraction: float = 1.0
    antithetic: bool = True
    rate: float = 1.0
    responses: int = 2

    def algorithm(self, stn: stn_fx.SelfTuningModule, rate: float) -> DeltaSTN:
        """With hyperparameters that never move."""
        step = EveryKth(OnFraction(Linearized(self.antithetic), self.fraction), self.every)
        optimizers = {
            "base_optimizer": partial(SGD, lr=rate, momentum=MOMENTUM),
            "response_optimizer": partial(SGD, lr=rate * self.rate, momentum=MOMENTUM),
            "hyper_optimizer": partial(SGD, lr=0.0),
        }
        return DeltaSTN(stn, response_step=step, tune_scales=False, **optimizers)


WAYS = {
    "default": Way(every=EVERY, fraction=FRACTION, responses=8),
    "whole batch, every second step": Way(responses=8),
    "single perturbations": Way(every=1, antithetic=False),
    "every eighth step": Way(every=8),
    "a third of the rate": Way(rate=1 / 3),
    "three times the rate": Way(rate=3.0),
    "two terms": Way(stn_fx.RowWise(2), responses=4),
    "four terms": Way(stn_fx.RowWise(4), responses=4),
    "LowRank(8)": Way(stn_fx.LowRank(8)),
    "LowRank(32)": Way(stn_fx.LowRank(32)),
}


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    splits: Splits
    rate: float
    epochs: int

    def wrapped(self, seed: int, form: ResponseForm = "rowwise") -> stn_fx.SelfTuningModule:
        """A new model; its weights are always the same, the seed is that of masks and perturbations."""
        torch.manual_seed(0)
        inputs = self.splits.train.channels * self.splits.train.size[0] * self.splits.train.size[1]
        layers: list[nn.Module] = [nn.Flatten()]
        for size, outputs in ((inputs, WIDTH), (WIDTH, WIDTH), (WIDTH, len(self.splits.classes))):
            layers += [nn.Dropout(0.2), nn.Linear(size, outputs), nn.ReLU()]
        x, _ = next(iter(self._batches("train", BATCH_SIZE, seed)))
        return stn_fx.transform(nn.Sequential(*layers[:-1]), HPARAMS, (x,), response=form, seed=seed)

    def fit(self, algorithm: Algorithm, seed: int, *callbacks: Callback) -> FitResult:
        """Train; the seed is that of the order of the data."""
        train, valid = self._batches("train", BATCH_SIZE, seed), self._batches("valid", VALID_BATCH, seed)
        trainer = BilevelTrainer(algorithm.stn, train=train, valid=valid, algorithm=algorithm)
        return trainer.fit(
            self.epochs, warmup_epochs=0, train_steps=TRAIN_STEPS, callbacks=callbacks, measure_trust=False
        )

    def _batches(self, part: str, size: int, seed: int) -> ImageBatches:
        normalisation = Normalisation.of(self.splits.train)
        images, drop_last = getattr(self.splits, part), part == "train"
        return ImageBatches(images, normalisation, size, shuffle=True, drop_last=drop_last, seed=seed)


class Hypergradients(Callback):
    """Means over each epoch, (epochs, H)."""

    def __init__(self) -> None:
        self.of_epoch: list[Tensor] = []
        self.means: list[list[float]] = []

    def outer_step_ended(self, trainer: BilevelTrainer, epoch: int, result: FitResult) -> None:
        gradient_H = trainer.stn.hparams.raw.grad
        assert gradient_H is not None
        self.of_epoch.append(gradient_H.clone())

    def epoch_ended(self, trainer: BilevelTrainer, record: object, result: FitResult) -> None:
        self.means.append(torch.stack(self.of_epoch).mean(0).tolist())
        self.of_epoch.clear()


def retrained(setting: Setting, seed: int, index: int, offset: float) -> list[float]:
    """Validation losses after every epoch of an ordinary run with one raw hyperparameter moved."""
    stn = setting.wrapped(seed)
    with torch.no_grad():
        stn.hparams.raw[index] += offset
    algorithm = FixedHyperparameters(stn, base_optimizer=partial(SGD, lr=setting.rate, momentum=MOMENTUM))
    return [record.valid_loss for record in setting.fit(algorithm, seed).history]


def responded(setting: Setting, way: Way, seed: int) -> list[list[float]]:
    """Mean hypergradients of every epoch, by hyperparameters."""
    found = Hypergradients()
    algorithm = way.algorithm(setting.wrapped(seed, way.form), setting.rate)
    setting.fit(algorithm, 0, found)
    return found.means


def kept(path: Path, compute: Callable[[], list]) -> list:
    """What a run gave, from its file where there is one."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(compute())
        write_atomically(path, lambda temporary: temporary.write_text(text))
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Findings:
    """What all runs gave, as means over windows of epochs.

    Attributes:
        names: of the hyperparameters.
        differences_SWH: between retrained runs, by seeds and windows.
        predicted_RWH: mean hypergradients of each way, by responses and windows.
    """

    names: list[str]
    differences_SWH: Tensor
    predicted_RWH: dict[str, Tensor]

    def between_halves(self) -> list[float]:
        """Cosines of the mean differences of half of the pairs with those of the other half, by windows."""
        return _cosines(self.differences_SWH[::2].mean(0), self.differences_SWH[1::2].mean(0))

    def of_single_pairs(self) -> list[float]:
        """Cosines of each pair's differences with the mean of the others, medians over the pairs, by windows."""
        total_WH, count = self.differences_SWH.sum(0), len(self.differences_SWH)
        alone = [_cosines(pair_WH, (total_WH - pair_WH) / (count - 1)) for pair_WH in self.differences_SWH]
        return [statistics.median(each) for each in zip(*alone, strict=True)]

    def cosines(self, way: str) -> list[list[float]]:
        """Of each response with the mean differences, by windows."""
        return [_cosines(predicted_WH, self.differences_SWH.mean(0)) for predicted_WH in self.predicted_RWH[way]]

    def rows(self, window: int) -> list[dict[str, float | str]]:
        """For the CSV file: one for each way, response, window and hyperparameter."""
        truth_WH = self.differences_SWH.mean(0)
        error_WH = self.differences_SWH.std(0) / len(self.differences_SWH) ** 0.5
        return [
            {
                "way": way,
                "response": response,
                "epochs": f"{w * window + 1}-{(w + 1) * window}",
                "hyperparameter": name,
                "hypergradient": predicted_WH[w, h].item(),
                "retrained": truth_WH[w, h].item(),
                "standard_error": error_WH[w, h].item(),
            }
            for way, predicted_RWH in self.predicted_RWH.items()
            for response, predicted_WH in enumerate(predicted_RWH)
            for w in range(len(truth_WH))
            for h, name in enumerate(self.names)
        ]


def _cosines(left_WH: Tensor, right_WH: Tensor) -> list[float]:
    return F.cosine_similarity(left_WH, right_WH, dim=1).tolist()


def measure(setting: Setting, seeds: int, step: float, window: int, folder: Path, console: Console) -> Findings:
    """All runs that are not done, and what they say."""
    names = setting.wrapped(0).hparams.names
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    def windows(epochs: Tensor, axis: int) -> Tensor:
        return epochs.unflatten(axis, (setting.epochs // window, window)).mean(axis + 1)

    with Progress(*columns, console=console) as progress:
        line = progress.add_task("retrained runs", total=seeds * len(names) * 2)
        differences_SHE = torch.zeros(seeds, len(names), setting.epochs)
        for seed in range(seeds):
            for index, name in enumerate(names):
                for sign, word in ((1, "above"), (-1, "below")):
                    run = partial(retrained, setting, 1 + seed, index, sign * step)
                    losses = kept(folder / "retrained" / f"{name}-{word}-{seed}.json", run)
                    differences_SHE[seed, index] += sign * torch.tensor(losses) / (2 * step)
                    progress.advance(line)
        line = progress.add_task("responses", total=sum(way.responses for way in WAYS.values()))
        predicted = {}
        for way, settings in WAYS.items():
            found = []
            for seed in range(settings.responses):
                run = partial(responded, setting, settings, seed)
                found.append(kept(folder / "responses" / f"{way}-{seed}.json", run))
                progress.advance(line)
            predicted[way] = windows(torch.tensor(found), 1)
    return Findings(list(names), windows(differences_SHE.transpose(1, 2), 1), predicted)


def table(findings: Findings, window: int) -> Table:
    """Cosines by windows, means of the responses of a way."""
    title = "cosine of hypergradient and retrained differences, by the last epoch of each window"
    shown = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("way", "all", *(str((w + 1) * window) for w in range(findings.differences_SWH.shape[1]))):
        shown.add_column(column, justify="left" if column == "way" else "right", no_wrap=column != "way")
    among = {"halves of the pairs": findings.between_halves(), "one pair with the others": findings.of_single_pairs()}
    for name, found in among.items():
        shown.add_row(name, *(f"{c:.2f}" for c in (statistics.median(found), *found)))
    for way in findings.predicted_RWH:
        cosines = findings.cosines(way)
        median = statistics.median(cosine for each in cosines for cosine in each)
        means = [statistics.fmean(each) for each in zip(*cosines, strict=True)]
        shown.add_row(way, *(f"{c:.2f}" for c in (median, *means)))
    return shown


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="as for stn-fx tune --data")
    parser.add_argument("--examples", type=int, default=15_000, help="two fifths of them for validation")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--window", type=int, default=5, help="epochs that a mean is over")
    parser.add_argument("--seeds", type=int, default=8, help="pairs for each hyperparameter")
    parser.add_argument("--step", type=float, default=0.7, help="of the raw hyperparameters")
    parser.add_argument("--rate", type=float, default=0.03, help="learning rate of the weights")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    options = parser.parse_args()
    if options.epochs % options.window:
        parser.error("--epochs must be a multiple of --window")
    torch.set_num_threads(1)
    source = load_images(options.data)
    examples = min(options.examples, len(source.train))
    splits = split_images(source.train, source.test, source.classes, VALID_FRACTION, examples)
    console = Console()
    setting = Setting(splits, options.rate, options.epochs)
    findings = measure(setting, options.seeds, options.step, options.window, options.out, console)
    rows = findings.rows(options.window)
    with (options.out / "hypergradient_accuracy.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    console.print(table(findings, options.window))


if __name__ == "__main__":
    main()
