"""Every model of torchvision, timm and transformers through stn_fx: is it converted, is it right, what does it cost?

    python examples/benchmarks/zoo.py --out zoo.csv                     # all; stop and start it as you like
    python examples/benchmarks/zoo.py --library timm --models "*vit*" --out zoo.csv
    python examples/benchmarks/zoo.py --summary --out zoo.csv           # markdown tables of what is there

Random weights, float64, batches of two small images or sentences; of identical blocks in a row two are kept (the column
"reduced" says so; ``--full-depth`` keeps all).  Each model runs in a process of its own with limits on time and memory,
and its row is appended when it is done; models that have a row are skipped.  "pass": every oracle of ``stn_fx.check``
holds, and at least 95 % of the scalars are conditioned.  The update's cost is that of a batch of two, where calling
operators outweighs computing: ``step_cost.py`` measures batches as one trains on.
"""

import argparse
import csv
import fnmatch
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from zoo_measure import Row, measure
from zoo_models import LIBRARIES, Entry, entries

import stn_fx

Table = list[dict[str, str]]
PATIENCE = 10
"""Limit on the time of the clock, as a multiple of that on the processor's: other work may keep it busy."""
_FORK = multiprocessing.get_context("fork")  # the libraries are imported once


def run_one(entry: Entry, full_depth: bool, seconds: float, gigabytes: float) -> dict[str, Any]:
    """The row of one model, measured in a process of its own."""
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_child, args=(entry, full_depth, seconds, gigabytes, sender))
    process.start()
    sender.close()
    row: dict[str, Any] = asdict(Row(entry.library, entry.name))
    end, ended = time.monotonic() + PATIENCE * seconds, False
    while not ended and receiver.poll(max(0.0, end - time.monotonic())):
        try:
            row = receiver.recv()
        except EOFError:
            ended = True
    if not ended:
        process.kill()
    process.join()
    late = not ended or process.exitcode == -signal.SIGXCPU
    if late or process.exitcode:
        why = f"not done after {seconds:.0f} s" if late else f"the process ended with {process.exitcode}"
        row["verdict"] = row["verdict"] or ("time" if late else "crash")  # the oracles' verdict stands without a cost
        row["reason"] = "; ".join(filter(None, (row["reason"], why)))
    return row


def _child(entry: Entry, full_depth: bool, seconds: float, gigabytes: float, sender: Connection) -> None:
    torch.set_num_threads(1)  # also renews the thread pool, which a fork leaves broken
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
    resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30),) * 2)
    with Path(os.devnull).open("w") as nowhere:  # torch and the profiler write pages about what they could not trace
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere.fileno(), stream.fileno())
    measure(entry, full_depth, sender.send)


def load(path: Path) -> Table:
    """The rows that are there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one row, floats in four digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerow({name: f"{v:.4g}" if isinstance(v, float) else v for name, v in row.items()})


def warm_up() -> None:
    """The first capture of a process loads much of torch; it should not count for the first model."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    stn_fx.transform(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "dropout", (torch.randn(2, 3),))


VERDICTS = ("pass", "partly", "refused", "WRONG", "crash", "time")


def summary(table: Table) -> str:
    """Two markdown tables: figures of each library, and every model that did not pass."""
    heading = ["library", "models", *VERDICTS, "median conditioned", "median conversion / export", "median update"]
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    for library in sorted({row["library"] for row in table}):
        rows = [row for row in table if row["library"] == library]
        counts = Counter(row["verdict"] for row in rows)
        cells = [library, str(len(rows)), *(str(counts[verdict]) for verdict in VERDICTS)]
        cells += [_median(rows, "conditioned", "{:.2%}"), _median(rows, "convert_ratio", "{:.1f}x")]
        cells += [_median(rows, "update_ratio", "{:.1f}x")]
        lines.append("| " + " | ".join(cells) + " |")
    failed = [row for row in table if row["verdict"] != "pass"]
    if failed:
        lines += ["", "| model | verdict | why |", "|---|---|---|"]
        lines += [f"| {r['library']} {r['model']} | {r['verdict']} | {r['reason'].replace('|', '/')} |" for r in failed]
    return "\n".join(lines)


def _median(rows: Table, column: str, form: str) -> str:
    values = [float(row[column]) for row in rows if row[column]]
    return form.format(statistics.median(values)) if values else "-"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), help="default: all")
    parser.add_argument("--models", nargs="+", default=["*"], help="names or patterns of the models (default: all)")
    parser.add_argument("--limit-seconds", type=float, default=300, help="processor time per model (default: 300)")
    parser.add_argument("--limit-gigabytes", type=float, default=16, help="address space per model (default: 16)")
    parser.add_argument("--full-depth", action="store_true", help="keep all of identical blocks in a row")
    parser.add_argument("--out", type=Path, default=Path("zoo.csv"), help="rows are appended here (default: zoo.csv)")
    parser.add_argument("--summary", action="store_true", help="print markdown tables of --out and measure nothing")
    arguments = parser.parse_args()
    console = Console()
    if arguments.summary:
        print(summary(load(arguments.out)))
        return
    done = {(row["library"], row["model"]) for row in load(arguments.out)}
    chosen = [
        entry
        for library in arguments.library
        for entry in entries(library)
        if any(fnmatch.fnmatch(entry.name, pattern) for pattern in arguments.models)
    ]
    todo = [entry for entry in chosen if (entry.library, entry.name) not in done]
    warm_up()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # No refreshing thread: the processes are forked.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("zoo", total=len(chosen), completed=len(chosen) - len(todo))
        for entry in todo:
            progress.update(task, description=f"{entry.library} {entry.name}", refresh=True)
            row = run_one(entry, arguments.full_depth, arguments.limit_seconds, arguments.limit_gigabytes)
            append(arguments.out, row)
            progress.advance(task)
            style = {"pass": "green", "WRONG": "bold red", "crash": "red"}.get(row["verdict"], "yellow")
            progress.print(
                f"[{style}]{row['verdict']:8}[/] {entry.library} {entry.name} {row['seconds']} s {row['reason'][:200]}"
            )
        progress.update(task, description="zoo", refresh=True)


if __name__ == "__main__":
    main()
