"""Cost of one Delta-STN training update relative to an ordinary one (forward, backward, SGD) of the same model.

    python examples/benchmarks/step_cost.py                      # all cases, about five minutes on 2 cores
    python examples/benchmarks/step_cost.py --cases simple_cnn --repetitions 30 --out step_cost.csv

Everything is timed in one process, variants interleaved, medians given.  Beside stn_fx stand two other ways
to linearize the same hyper-conditioned forward (same layers, dropouts and detached base): an own implementation of the
published one, the double backward (differentiated backwards twice at zero change), and one ``torch.func.jvp`` over
the whole graph.
"""

import argparse
import copy
import csv
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.table import Table
from simple_cnn import SimpleCNN
from torch import Tensor, nn

import stn_fx
from stn_fx.augment.draws import Draws
from stn_fx.bilevel import DeltaSTN, Linearized
from stn_fx.bilevel.response_step import EVERY, ResponseStep, usual_step
from stn_fx.compiler.rewrite import rewrite
from stn_fx.rules import load_builtin_rules
from stn_fx.rules.dropout import DropoutRule
from stn_fx.rules.normalization import BatchNormRule


@dataclass(frozen=True)
class Case:
    """A model, its input shape (batch first), and the two response structures to measure."""

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]


CASES = [
    Case("simple_cnn 128x1x28x28", SimpleCNN, (128, 1, 28, 28)),
    Case("resnet18 128x3x32x32", lambda: torchvision.models.resnet18(num_classes=10), (128, 3, 32, 32)),
    Case("resnet18 64x3x64x64", lambda: torchvision.models.resnet18(num_classes=10), (64, 3, 64, 64)),
]
RESPONSES = {"row-wise": "rowwise", "low-rank 8": stn_fx.LowRank(8)}


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of every timed update."""
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


class PlainUpdate:
    """Ordinary training of the user's model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.optimizer = sgd(list(model.parameters()))

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()


class DoubleBackwardUpdate:
    """Base pass, then the linearized pass by two reverse passes, as the published Delta-STN code does it."""

    def __init__(self, model: nn.Module, hparams: str, x: Tensor) -> None:
        rules = load_builtin_rules().copy()
        rules.add(_DroppingDropout())
        rules.add(_FixedBatchNorm())
        self.stn = stn_fx.transform(model.train(), hparams, (x,), rules=rules)
        compiled = self.stn.compiled
        self.conditioned = rewrite(compiled.analysed["training"], compiled.plan, rules, "response")
        self.base = PlainUpdate(self.stn)
        self.base.optimizer = sgd(list(self.stn.base_parameters()))
        self.optimizer = sgd(list(self.stn.response_parameters()))

    def linearize(self, x: Tensor, raw_BH: Tensor) -> tuple[Tensor, Tensor]:
        """``f(x; w0)`` and ``J_w f . DeltaW(delta)``; the inner gradient is linear in a dummy cotangent."""
        delta_BH = raw_BH - self.stn.hparams.raw.detach()
        zero_BH = torch.zeros_like(delta_BH, requires_grad=True)
        state = {name: value.detach() for name, value in self.stn._state(self.stn.compiled).items()}
        values = self.stn.hparams.constrain(raw_BH)
        draws = Draws(self.stn.generator())
        (primal,) = self.conditioned(state, self.stn._response(), values, zero_BH, draws, x)
        dummy = torch.zeros_like(primal, requires_grad=True)
        (pulled,) = torch.autograd.grad(primal, zero_BH, dummy, create_graph=True)
        (tangent,) = torch.autograd.grad(pulled, dummy, delta_BH, create_graph=True)
        return primal.detach(), tangent

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self.base(x, y)
        self.optimizer.zero_grad()
        primal, tangent = self.linearize(x, self.stn.hparams.sample(len(x)).detach())
        F.cross_entropy(primal + tangent, y).backward()
        self.optimizer.step()


class WholeGraphUpdate(DoubleBackwardUpdate):
    """The same conditioned forward, linearized by one ``torch.func.jvp`` over the whole graph."""

    def linearize(self, x: Tensor, raw_BH: Tensor) -> tuple[Tensor, Tensor]:
        """Primal and tangent by forward mode; ``delta`` is the only dual."""
        delta_BH = raw_BH - self.stn.hparams.raw.detach()
        state = {name: value.detach() for name, value in self.stn._state(self.stn.compiled).items()}
        values, draws = self.stn.hparams.constrain(raw_BH), Draws(self.stn.generator())

        def on_delta(delta: Tensor) -> Tensor:
            return self.conditioned(state, self.stn._response(), values, delta, draws, x)[0]

        primal, tangent = torch.func.jvp(on_delta, (torch.zeros_like(delta_BH),), (delta_BH,))
        return primal.detach(), tangent


class _DroppingDropout(DropoutRule):
    """Dropout that also drops in the conditioned forward of the baseline."""

    def respond(self, emit, node):  # type: ignore[no-untyped-def]
        return self.base(emit, node)


class _FixedBatchNorm(BatchNormRule):
    """PyTorch has no third derivative of batch norm: the baseline gets a fixed scale and shift, which favours it."""

    def respond(self, emit, node):  # type: ignore[no-untyped-def]
        names = ("running_mean", "running_var")
        mean, variance = (emit.value(emit.argument(node, name)) for name in names)
        weight, bias = self.changes(emit, node)
        return emit.call(_fixed_batch_norm, emit.value(node.args[0]), mean, variance, weight, bias)


def _fixed_batch_norm(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    scale = weight * torch.rsqrt(variance + 1e-5).reshape(-1, 1, 1)
    return x * scale + (bias - mean.reshape(-1, 1, 1) * scale)


class DeltaSTNUpdate:
    """One ``inner_step``; its parts are timed apart.

    The default has two linearized passes over a part of the batch in some of the steps; here it is one over all of it
    in each, the full update, unless another way is given.
    """

    def __init__(
        self, model: nn.Module, hparams: str, x: Tensor, response: object, step: ResponseStep | None = None
    ) -> None:
        self.stn = stn_fx.transform(model.train(), hparams, (x,), response=response)  # type: ignore[arg-type]
        self.steps = DeltaSTN(
            self.stn,
            F.cross_entropy,
            base_optimizer=sgd(list(self.stn.base_parameters())),
            response_optimizer=sgd(list(self.stn.response_parameters())),
            response_step=step or Linearized(antithetic=False),
        )

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self.steps.inner_step((x, y))

    def outer(self, x: Tensor, y: Tensor) -> None:
        """One outer step."""
        self.steps.outer_step((x, y))

    def passes_only(self, x: Tensor, y: Tensor) -> None:
        """What an inner step computes in its passes (forward, backward, update), with everything else prepared."""
        self.stn.train()
        for forward, optimizer in ((self.stn, self.base), (self._linearized, self.response)):
            optimizer.zero_grad()
            F.cross_entropy(forward(x), y).backward()
            optimizer.step()

    def prepare(self, batch: int) -> None:
        """Optimizers and a fixed perturbation for ``passes_only``."""
        self.base = sgd(list(self.stn.base_parameters()))
        self.response = sgd(list(self.stn.response_parameters()))
        self.raw_BH = self.stn.hparams.sample(batch).detach()

    def _linearized(self, x: Tensor) -> Tensor:
        with self.stn.in_groups(self.steps.sampling.group):
            primal, tangent = self.stn.linearize(x, raw=self.raw_BH)
        return primal + tangent


@dataclass
class Timings:
    """Interleaved timings of several variants, in seconds."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Median time of one variant."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, baseline: str = "plain") -> float:
        """Median of the ratios within each repetition, which cancels slow drifts of the machine."""
        pairs = zip(self.seconds[name], self.seconds[baseline], strict=True)
        return statistics.median(value / base for value, base in pairs)


def interleave(variants: dict[str, Callable[[], None]], repetitions: int, warm_up: int = 2) -> Timings:
    """Run every variant in turn, ``repetitions`` times after ``warm_up`` rounds.

    The order is another one in every round, because a variant leaves its memory behind for the next one.
    """
    timings = Timings({name: [] for name in variants})
    order = random.Random(0)
    for repetition in range(repetitions + warm_up):
        for name in order.sample(list(variants), len(variants)):
            start = time.perf_counter()
            variants[name]()
            if repetition >= warm_up:
                timings.seconds[name].append(time.perf_counter() - start)
    return timings


def peak_bytes(run: Callable[[], None]) -> int:
    """Peak of the memory that ``run`` allocates on the CPU, by the profiler's allocation events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    allocations = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(allocations, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(case: Case, hparams: str, repetitions: int) -> list[dict[str, float | str]]:
    """All figures of one case, one row for each response structure."""
    torch.manual_seed(0)
    x, y = torch.randn(case.shape), torch.randint(0, 10, (case.shape[0],))
    model = case.model()
    plain = PlainUpdate(copy.deepcopy(model))
    double = DoubleBackwardUpdate(copy.deepcopy(model), hparams, x)
    whole = WholeGraphUpdate(copy.deepcopy(model), hparams, x)
    updates = {name: DeltaSTNUpdate(copy.deepcopy(model), hparams, x, r) for name, r in RESPONSES.items()}
    usual = {name: DeltaSTNUpdate(copy.deepcopy(model), hparams, x, r, usual_step()) for name, r in RESPONSES.items()}
    decayed = DeltaSTNUpdate(copy.deepcopy(model), f"{hparams},weight_decay", x, "rowwise")
    variants: dict[str, Callable[[], None]] = {
        "plain": lambda: plain(x, y),
        "double backward": lambda: double(x, y),
        "whole-graph jvp": lambda: whole(x, y),
        "weight decay": lambda: decayed(x, y),
    }
    for name, update in updates.items():
        update.prepare(len(x))
        variants[name] = lambda update=update: update(x, y)  # type: ignore[misc]
        variants[f"{name} usual"] = lambda steps=usual[name]: [steps(x, y) for _ in range(EVERY)]  # type: ignore[misc]
        variants[f"{name} outer"] = lambda update=update: update.outer(x, y)  # type: ignore[misc]
        variants[f"{name} passes"] = lambda update=update: update.passes_only(x, y)  # type: ignore[misc]
    timings = interleave(variants, repetitions)
    rows: list[dict[str, float | str]] = []
    for name, update in updates.items():
        predicted = update.stn.report.cost.ratio
        rows.append(
            {
                "case": case.name,
                "response": name,
                "plain_ms": 1e3 * timings.median("plain"),
                "default_ratio": timings.ratio(f"{name} usual") / EVERY,
                "update_ratio": timings.ratio(name),
                "predicted_ratio": predicted,
                "double_backward_ratio": timings.ratio("double backward"),
                "whole_graph_jvp_ratio": timings.ratio("whole-graph jvp"),
                "cheaper_than_double_backward": timings.ratio("double backward", name),
                "weight_decay_extra": timings.ratio("weight decay") - timings.ratio("row-wise"),
                "outside_passes": 1 - 1 / timings.ratio(name, f"{name} passes"),
                "outer_step_ratio": timings.ratio(f"{name} outer"),
                "peak_memory_ratio": peak_bytes(variants[name]) / peak_bytes(variants["plain"]),
            }
        )
    return rows


def show(rows: list[dict[str, float | str]], console: Console) -> None:
    """Print the figures as a table."""
    table = Table(title="Delta-STN training update, relative to an ordinary one", show_lines=False)
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="left" if column in ("case", "response") else "right")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else value for value in row.values()))
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="part of the names of the cases to run (default: all)")
    parser.add_argument("--hparams", default="dropout", help="hyperparameters (default: dropout)")
    parser.add_argument("--repetitions", type=int, default=9, help="timed rounds (default: 9)")
    parser.add_argument("--out", type=Path, help="also write the figures as CSV")
    arguments = parser.parse_args()
    console = Console()
    rows = []
    for case in CASES:
        if arguments.cases in case.name:
            with console.status(f"measuring {case.name}"):
                rows += measure(case, arguments.hparams, arguments.repetitions)
            show(rows[-len(RESPONSES) :], console)
    if arguments.out is not None and rows:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        console.print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
