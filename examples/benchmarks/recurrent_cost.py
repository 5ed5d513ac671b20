"""Cost of one Delta-STN training update of a recurrent language model, relative to ordinary ones.

    python examples/benchmarks/recurrent_cost.py                       # all cases, some minutes on 2 cores
    python examples/benchmarks/recurrent_cost.py --cases lstm --repetitions 15 --out recurrent_cost.csv

The ordinary update is that of the same model, once with torch's fused network and once with a Python loop over the time
steps.  Beside stn_fx stands one ``torch.func.jvp`` over the same hyper-conditioned training graph, whose recurrence is
a loop: what its own linear recurrence saves.  One process, variants interleaved, medians.
"""

import argparse
import copy
import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from step_cost import RESPONSES, DeltaSTNUpdate, PlainUpdate, WholeGraphUpdate, interleave
from torch import Tensor, nn

VOCABULARY = 200


class LanguageModel(nn.Module):
    """Embedding, recurrent network, decoder; tokens (B, T) to logits (B, vocabulary, T)."""

    def __init__(self, network: nn.Module, width: int) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(VOCABULARY, width), nn.Dropout(0.2)
        self.network, self.decoder = network, nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.network(self.drop(self.embed(tokens)))[0]
        return self.decoder(self.drop(states)).transpose(1, 2)


class Loop(nn.Module):
    """A network of ``layers`` layers, dropout between them, as a Python loop over its cells; x is (B, T, width)."""

    def __init__(self, cell: type[nn.RNNCellBase], width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cell(width, width) for _ in range(layers))  # type: ignore[call-arg]
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for i, cell in enumerate(self.cells):
            x = x if i == 0 else self.drop(x)
            state, outputs = None, []
            for step in x.unbind(1):
                state = cell(step, state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
            x = torch.stack(outputs, 1)
        return (x,)


@dataclass(frozen=True)
class Case:
    """B sequences of T steps, and a network of ``layers`` layers of ``width`` cells, fused and as a loop."""

    kind: str
    width: int
    batch: int
    steps: int
    layers: int = 2

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"{self.kind} {self.layers}x{self.width}, {self.batch}x{self.steps} tokens"

    def models(self) -> tuple[nn.Module, nn.Module]:
        """(fused, loop)."""
        network, cell = {"lstm": (nn.LSTM, nn.LSTMCell), "gru": (nn.GRU, nn.GRUCell)}[self.kind]
        dropout = 0.2 if self.layers > 1 else 0.0
        fused = network(self.width, self.width, self.layers, dropout=dropout, batch_first=True)
        loop = Loop(cell, self.width, self.layers, dropout)
        return LanguageModel(fused, self.width), LanguageModel(loop, self.width)


CASES = [
    Case("lstm", 128, 32, 35),
    Case("lstm", 256, 64, 35),
    Case("lstm", 128, 32, 200, layers=1),
    Case("gru", 128, 32, 35),
]


def measure(case: Case, repetitions: int) -> list[dict[str, float | str]]:
    """One row for each response structure."""
    torch.manual_seed(0)
    x, y = torch.randint(VOCABULARY, (case.batch, case.steps)), torch.randint(VOCABULARY, (case.batch, case.steps))
    model, loop_model = case.models()
    plain, loop = PlainUpdate(copy.deepcopy(model)), PlainUpdate(loop_model)
    whole = WholeGraphUpdate(copy.deepcopy(model), "dropout", x)
    updates = {name: DeltaSTNUpdate(copy.deepcopy(model), "dropout", x, r) for name, r in RESPONSES.items()}
    variants: dict[str, Callable[[], None]] = {
        "plain": lambda: plain(x, y),
        "loop": lambda: loop(x, y),
        "whole-graph jvp": lambda: whole(x, y),
    }
    for name, update in updates.items():
        variants[name] = lambda update=update: update(x, y)  # type: ignore[misc]
        variants[f"{name} outer"] = lambda update=update: update.outer(x, y)  # type: ignore[misc]
    timings = interleave(variants, repetitions)
    return [
        {
            "case": case.name,
            "response": name,
            "plain_ms": 1e3 * timings.median("plain"),
            "loop_ms": 1e3 * timings.median("loop"),
            "update_ratio": timings.ratio(name),
            "ratio_to_loop": timings.ratio(name, "loop"),
            "predicted_ratio": update.stn.report.cost.ratio,
            "whole_graph_jvp_ratio": timings.ratio("whole-graph jvp"),
            "outer_step_ratio": timings.ratio(f"{name} outer"),
        }
        for name, update in updates.items()
    ]


def show(rows: list[dict[str, float | str]], console: Console) -> None:
    """Print the figures as a table."""
    table = Table(title="Delta-STN training update of a recurrent network, relative to an ordinary one")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="left" if column in ("case", "response") else "right")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else value for value in row.values()))
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="part of the names of the cases to run (default: all)")
    parser.add_argument("--repetitions", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--out", type=Path, help="also write the figures as CSV")
    arguments = parser.parse_args()
    console = Console()
    rows: list[dict[str, float | str]] = []
    for case in CASES:
        if arguments.cases in case.name:
            with console.status(f"measuring {case.name}"):
                rows += measure(case, arguments.repetitions)
    show(rows, console)
    if arguments.out is not None and rows:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        console.print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
