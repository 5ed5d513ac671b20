"""Cost of attention under Delta-STN, by sequence length: each pass beside ordinary training of the same block.

    python examples/benchmarks/attention_cost.py
    python examples/benchmarks/attention_cost.py --lengths 128 512 --out attention_cost.csv

The model is two pre-norm Transformer blocks without a convolution or pooling, so that attention is a large share.  With
an attention-dropout hyperparameter ("dropped") the probabilities are explicit in training; without one ("kept") the
base pass keeps torch's fused kernel, and so does the response pass in both.  Counted in matrix products of attention
alone (forward of the primal 2): the linearized pass needs the primal's 2, 4 for the tangent and 8 for its backward.
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from step_cost import DeltaSTNUpdate, PlainUpdate, interleave, peak_bytes
from torch import Tensor, nn

WIDTH, HEADS, CLASSES, BATCH = 128, 4, 10, 4
VARIANTS = {"kept": "dropout@blocks.*.mlp.*", "dropped": "dropout@blocks.*.attention_drop, dropout@blocks.*.mlp.*"}


class Block(nn.Module):
    """Pre-norm self-attention and MLP, as timm and Hugging Face write them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attention_drop = nn.Dropout(0.1)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, WIDTH) to the same."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.attention_drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Two blocks and a head over the mean token."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, WIDTH) to scores (B, CLASSES)."""
        return self.head(self.blocks(x).mean(1))


def measure(length: int, repetitions: int) -> list[dict[str, float | str]]:
    """One row for each way to treat the attention probabilities."""
    x, y = torch.randn(BATCH, length, WIDTH), torch.randint(0, CLASSES, (BATCH,))
    rows: list[dict[str, float | str]] = []
    for name, hparams in VARIANTS.items():
        torch.manual_seed(0)
        plain_model, model = Model(), Model()
        if name == "kept":
            for block in (*plain_model.blocks, *model.blocks):
                block.attention_drop.p = 0.0
        plain, update = PlainUpdate(plain_model), DeltaSTNUpdate(model, hparams, x, "rowwise")
        update.prepare(BATCH)
        variants: dict[str, Callable[[], None]] = {
            "plain": lambda plain=plain: plain(x, y),  # type: ignore[misc]
            "base": lambda update=update: one_pass(update.stn, update.base, x, y),  # type: ignore[misc]
            "linearized": lambda update=update: one_pass(update._linearized, update.response, x, y),  # type: ignore[misc]
            "update": lambda update=update: update(x, y),  # type: ignore[misc]
            "outer": lambda update=update: update.outer(x, y),  # type: ignore[misc]
        }
        timings = interleave(variants, repetitions)
        ratios = {f"{each}_ratio": timings.ratio(each) for each in ("base", "linearized", "update", "outer")}
        memory = peak_bytes(variants["update"]) / peak_bytes(variants["plain"])
        rows.append(
            {"length": float(length), "attention": name, "plain_ms": 1e3 * timings.median("plain")}
            | ratios
            | {"peak_memory_ratio": memory}
        )
    return rows


def one_pass(forward: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """Forward, backward and update of one pass."""
    optimizer.zero_grad()
    F.cross_entropy(forward(x), y).backward()
    optimizer.step()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--repetitions", type=int, default=9, help="timed rounds (default: 9)")
    parser.add_argument("--out", type=Path, help="also write the figures as CSV")
    options = parser.parse_args()
    rows = [row for length in options.lengths for row in measure(length, options.repetitions)]
    table = Table(title="relative to an ordinary training update")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()))
    Console().print(table)
    if options.out is not None:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
