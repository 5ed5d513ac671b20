"""`stn-fx plot` and `stn-fx report`: a finished or running run as a picture, and as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stn_fx.bilevel.atomic import write_atomically
from stn_fx.bilevel.html_report import html_report
from stn_fx.bilevel.plot import draw
from stn_fx.bilevel.recorded_run import read_run, require_history
from stn_fx.errors import InputError

PICTURES, PAGES = (".png", ".pdf", ".svg"), (".html", ".htm")
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, as `stn-fx tune` printed it.")]


def plot(
    run: Run,
    out: Annotated[
        Path | None, typer.Option(help="Picture to write (.png, .pdf, .svg); else RUN/schedule.png.")
    ] = None,
) -> None:
    """Draw losses, schedules and scales of a run, also of one that is still going on."""
    recorded = read_run(run)
    require_history(recorded)
    path = _writable(out or run / "schedule.png", PICTURES)
    write_atomically(path, lambda temporary: draw(recorded.result, recorded.specs).savefig(temporary))
    Console().print(f"Picture: {path}", soft_wrap=True, markup=False)


def report(
    run: Run, out: Annotated[Path | None, typer.Option(help="Page to write; else RUN/report.html.")] = None
) -> None:
    """Write one HTML page about a run: values, how far to trust them, pictures, epochs. It needs no network."""
    page = html_report(read_run(run))
    path = _writable(out or run / "report.html", PAGES)

    def write(temporary: Path) -> None:
        temporary.write_text(page, encoding="utf-8")

    write_atomically(path, write)
    Console().print(f"Report: {path}", soft_wrap=True, markup=False)


def _writable(path: Path, suffixes: tuple[str, ...]) -> Path:
    if path.suffix.lower() not in suffixes:
        raise InputError(f"--out {path}: the name must end in {' or '.join(suffixes)}.")
    if not path.parent.is_dir():
        raise InputError(f"--out {path}: there is no folder {path.parent}. Make it, or choose another place.")
    return path
