"""The application `stn-fx`: the list of its commands."""

import typer

from .convert import convert
from .errors import reports_errors
from .hparams import hparams
from .inspect import inspect
from .replay import replay
from .show import plot, report
from .tune import tune

app = typer.Typer(
    name="stn-fx",
    help="Tunes the regularization hyperparameters of any unmodified PyTorch model, while it trains, in one run.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # a bug keeps Python's own traceback
    add_completion=False,
)


@app.callback()
def _application() -> None:
    """Tunes the regularization hyperparameters of any unmodified PyTorch model, while it trains, in one run."""


app.command()(reports_errors(hparams))
app.command()(reports_errors(inspect))
app.command()(reports_errors(convert))
app.command()(reports_errors(tune))
app.command()(reports_errors(plot))
app.command()(reports_errors(report))
app.command()(reports_errors(replay))

if __name__ == "__main__":
    app()
