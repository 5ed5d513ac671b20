"""Do the passes become faster by torch.compile?  Each beside itself as it is, on one model after the other.

    python examples/benchmarks/compiled_passes.py
    python examples/benchmarks/compiled_passes.py --models small_cnn --device cuda --out compiled_passes.csv

An update of the weights is a pass forward and backward and a step; an outer step is the response pass, its backward and
a step.  Random numbers are drawn outside of what is compiled, since the generators of stn_fx are no part of a graph.
Both models get the same batches; the largest difference of their parameters after two steps of each kind is given too.
"""

import argparse
import csv
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from step_cost import interleave
from torch import Tensor, nn

import stn_fx
from stn_fx.augment.draws import Draws
from stn_fx.bilevel import DeltaSTN
from stn_fx.bilevel.algorithm import training_mode
from stn_fx.bilevel.updates import base_update

CLASSES = 10


def small_cnn() -> nn.Module:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Dropout(0.1), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2048, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, CLASSES),
    )  # fmt: skip


def tiny_vit() -> nn.Module:
    """Timm's test_vit."""
    import timm

    return timm.create_model("test_vit", img_size=32, num_classes=CLASSES)  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "small_cnn": small_cnn,
    "tiny_vit": tiny_vit,
    "resnet18": lambda: torchvision.models.resnet18(num_classes=CLASSES),
}


class Subject:
    """One wrapped model and its steps on one batch."""

    def __init__(self, build: Callable[[], nn.Module], x: Tensor, y: Tensor) -> None:
        torch.manual_seed(0)
        self.batch = (x, y)
        self.stn = stn_fx.transform(build().to(x.device), "dropout,weight_decay", (x,), seed=0)
        self.steps = DeltaSTN(self.stn)

    def compile(self) -> None:
        """Both passes; the first steps take the time that compilation takes."""
        for name in ("uniform", "normal", "gamma", "permutation", "bits"):
            setattr(Draws, name, torch.compiler.disable(getattr(Draws, name)))
        compiled = self.stn.compiled
        compiled.base, compiled.response = torch.compile(compiled.base), torch.compile(compiled.response)  # type: ignore[assignment]

    def base(self) -> None:
        """One update of the weights."""
        steps = self.steps
        batch = steps.prepare(self.batch)
        with training_mode(self.stn):
            base_update(self.stn, steps.objective, steps.updaters["base"], batch, steps.precision())

    def outer(self) -> None:
        """One outer step."""
        self.steps.outer_step(self.batch)


def measure(name: str, device: torch.device, batch: int, repetitions: int) -> dict[str, float | str]:
    """One row of the table."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(batch, 3, 32, 32, generator=generator), torch.randint(0, CLASSES, (batch,), generator=generator)
    x, y = x.to(device), y.to(device)
    eager, compiled = Subject(MODELS[name], x, y), Subject(MODELS[name], x, y)
    compiled.compile()
    started = time.perf_counter()
    for _ in range(2):  # a second shape of the state, as after the first step of momentum, compiles again
        for subject in (eager, compiled):
            subject.base()
            subject.outer()
    seconds = time.perf_counter() - started
    pairs = zip(eager.stn.parameters(), compiled.stn.parameters(), strict=True)
    difference = max((mine - other).abs().max().item() for mine, other in pairs)
    timings = interleave(
        {"base": eager.base, "compiled base": compiled.base, "outer": eager.outer, "compiled outer": compiled.outer},
        repetitions,
    )
    return {
        "model": name,
        "device": str(device),
        "base": timings.ratio("compiled base", "base"),
        "outer": timings.ratio("compiled outer", "outer"),
        "compilation_s": seconds,
        "difference": difference,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--out", type=Path, help="CSV file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(options.device)
    rows: list[dict[str, float | str]] = []
    for name in options.models:
        rows.append(measure(name, device, options.batch, options.repetitions))
        Console().print(rows[-1])
        if options.out is not None:  # at once: the next model may take minutes to compile
            with options.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    shown = Table(title="time of the compiled pass / of the pass as it is", title_justify="left")
    for column in rows[0]:
        shown.add_column(column)
    for row in rows:
        shown.add_row(*(f"{value:.3g}" if isinstance(value, float) else value for value in row.values()))
    Console().print(shown)


if __name__ == "__main__":
    main()
