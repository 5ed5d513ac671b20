"""What batch norms do to hypergradients: perturbations by example or in groups, statistics that stay or that follow.

    python examples/benchmarks/batch_norm_hypergradients.py --data ~/data --out batch_norm.csv    # ten minutes

The CIFAR-10 task of `quality.py` trains at hyperparameters that stay as they are, with a response beside it that learns
as for tuning, once from perturbations of every example (as published), once from groups that batch norms are told of.
Every outer step takes the hypergradient twice, with running statistics that stay and that follow the weights, and moves
nothing.  Printed is, for each hyperparameter, the mean over the steps and its ratio to the standard deviation of a
single step: the signal that an optimizer which sees single steps has to find in their noise.
"""

import argparse
import csv
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quality_tasks import CIFAR
from quality_training import sgd
from quality_tuners import EVERY, TRAIN_STEPS
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stn_fx.bilevel import BilevelTrainer, DeltaSTN, EveryKth, Linearized, PerExample, PerGroup
from stn_fx.bilevel.steps import OuterRecord
from stn_fx.bilevel.updates import named_values
from stn_fx.data import ImageBatches
from stn_fx.data.batches import Normalisation

SCALE = 0.3
"""Of the perturbations; tuned ones of this task are between 0.1 and 0.5."""
STATISTICS = {"stay": "respond", "follow": "respond_with_statistics"}


class Watching(DeltaSTN):
    """Outer steps look, and move nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen: dict[str, list[Tensor]] = {name: [] for name in STATISTICS}

    def outer_step(self, content: Any) -> OuterRecord:
        """Hypergradients (H,) of one validation batch, in both ways."""
        batch = self.prepare(content)
        sampled_BH = self.sampling.outer(self.stn.hparams, batch.rows, self.perturbations).detach()
        for name, method in STATISTICS.items():
            raw_BH = sampled_BH.clone().requires_grad_()
            output = batch.feed(getattr(self.stn, method), raw=raw_BH)
            loss = self.objective.validation_loss(output, batch, named_values(self.stn, raw_BH.detach()))
            self.seen[name].append(torch.autograd.grad(loss, raw_BH)[0].sum(0))
        return OuterRecord(loss.item())


def main() -> None:
    """Train twice, print and write the four ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar10-jpeg")
    parser.add_argument("--start", default="half", choices=list(CIFAR.starts))
    parser.add_argument("--epochs", type=int, default=13)
    parser.add_argument("--warmup", type=int, default=5, help="epochs before the first hypergradient")
    parser.add_argument("--out", type=Path, help="CSV file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    splits = CIFAR.splits(options.data)
    batches = partial(ImageBatches, normalisation=Normalisation.of(splits.train), batch_size=CIFAR.batch_size)
    rows: list[dict[str, Any]] = []
    for sampling in (PerExample(), PerGroup()):
        stn = CIFAR.wrapped(splits, 0)
        stn.hparams.set_values(dict(CIFAR.starts[options.start]))
        with torch.no_grad():
            stn.hparams.raw_scale.fill_(torch.tensor(SCALE).expm1().log())
        algorithm = Watching(
            stn,
            sampling=sampling,
            response_step=EveryKth(Linearized(), EVERY),
            base_optimizer=sgd(CIFAR),
            response_optimizer=sgd(CIFAR),
        )
        training = batches(splits.train, shuffle=True, drop_last=True, seed=0)
        validation = batches(splits.valid, shuffle=True, seed=1)
        trainer = BilevelTrainer(stn, train=training, valid=validation, algorithm=algorithm)
        with console.status(f"training with {sampling}"):
            trainer.fit(options.epochs, warmup_epochs=options.warmup, train_steps=TRAIN_STEPS, measure_trust=False)
        for name, seen in algorithm.seen.items():
            steps_SH = torch.stack(seen)
            for hyperparameter, each in zip(stn.hparams.names, steps_SH.T, strict=True):
                mean, spread = each.mean().item(), each.std().item()
                row = {"perturbations": str(sampling), "statistics": name, "hyperparameter": hyperparameter}
                rows.append(row | {"steps": len(each), "mean": mean, "signal_to_noise": abs(mean) / spread})
    table = Table("perturbations", "statistics", "signal to noise of a step, median", "range", box=SIMPLE)
    for key in dict.fromkeys((row["perturbations"], row["statistics"]) for row in rows):
        ratios = [row["signal_to_noise"] for row in rows if (row["perturbations"], row["statistics"]) == key]
        table.add_row(*key, f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}")
    console.print(table)
    if options.out is not None:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
