"""How much of a hypergradient is noise of the response?  Antithetic perturbations against single ones.

    python examples/benchmarks/response_noise.py                                  # scikit-learn's digits, a minute
    python examples/benchmarks/response_noise.py --data ~/data/fashion-mnist --epochs 10 --out response_noise.csv

One SimpleCNN is trained at fixed hyperparameters.  Beside it several responses learn, two for each way, which differ in
nothing but their perturbations and masks.  After every epoch each gives the hypergradient on the whole validation set,
without perturbation.  What the two of a way have in common is signal, what they differ by is noise; the correlation is
the share of the signal in the square of a hypergradient.
"""

import argparse
import csv
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from simple_cnn import SimpleCNN
from torch import Tensor
from torch.optim import SGD

import stn_fx
from stn_fx.bilevel import DeltaSTN, EveryKth, FixedHyperparameters, Linearized
from stn_fx.bilevel.algorithm import training_mode
from stn_fx.data import ImageBatches, load_images, split_images
from stn_fx.data.batches import Normalisation

WAYS = {
    "single, every step": lambda: Linearized(antithetic=False),
    "antithetic, every second step": lambda: EveryKth(Linearized(), 2),
}


def hypergradient(stn: stn_fx.SelfTuningModule, batches: ImageBatches) -> Tensor:
    """Of the mean validation loss by the raw hyperparameters (H,), at the current ones."""
    stn.eval()
    total, count = torch.zeros(len(stn.hparams)), 0
    for x, y in batches:
        loss = F.cross_entropy(stn.respond(x), y, reduction="sum")
        total += torch.autograd.grad(loss, stn.hparams.raw)[0]
        count += len(y)
    stn.train()
    return total / count


def main() -> None:
    """Train, print a row for every epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="as for stn-fx tune --data")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate of weights and responses")
    parser.add_argument("--out", type=Path, help="CSV file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = load_images(options.data)
    splits = split_images(source.train, source.test, source.classes, examples=10_000)
    batches = partial(ImageBatches, normalisation=Normalisation.of(splits.train))
    training = batches(splits.train, batch_size=128, shuffle=True, drop_last=True)
    validation = batches(splits.valid, batch_size=500)
    sgd = partial(SGD, lr=options.rate, momentum=0.9)

    def wrapped(seed: int) -> stn_fx.SelfTuningModule:
        torch.manual_seed(0)
        model = SimpleCNN(splits.train.channels, splits.train.size[0], len(splits.classes), rate=0.1)
        return stn_fx.transform(model, "dropout,cutout,weight_decay", (next(iter(training))[0],), seed=seed)

    base = FixedHyperparameters(wrapped(0), base_optimizer=sgd)
    learners = {
        (way, seed): DeltaSTN(wrapped(seed), base_optimizer=sgd, response_optimizer=sgd, response_step=step())
        for way, step in WAYS.items()
        for seed in (1, 2)
    }
    rows: list[dict[str, float | str]] = []
    for epoch in track(range(1, options.epochs + 1), "epochs"):
        for content in training:
            base.inner_step(content)
            for learner in learners.values():
                learner.stn.model.load_state_dict(base.stn.model.state_dict())
                batch = learner.prepare(content)
                with training_mode(learner.stn):
                    learner.response_step(learner, batch)
        found = {key: hypergradient(learner.stn, validation) for key, learner in learners.items()}
        for way in WAYS:
            first, second = found[way, 1], found[way, 2]
            # Expected: signal^2, as the noise of the two is independent, and 2 noise^2.
            common, different = torch.dot(first, second).item(), (first - second).square().sum().item()
            rows.append({"epoch": epoch, "way": way, "signal_squared": common, "noise_squared": different / 2})
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    table = Table(title="hypergradients of two responses that differ in their perturbations", title_justify="left")
    for column in ("way", "noise", "signal", "correlation"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way in WAYS:
        signal, noise = (
            sum(float(r[key]) for r in rows if r["way"] == way) for key in ("signal_squared", "noise_squared")
        )
        each = [math.sqrt(max(0.0, total) / options.epochs) for total in (noise, signal)]
        table.add_row(way, *(f"{value:.1e}" for value in each), f"{signal / (signal + noise):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
