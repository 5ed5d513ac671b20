"""How errors reach the user: what stn_fx raises on purpose as one red message, bugs with their traceback."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer
from rich.console import Console

from stn_fx.bilevel.interruption import Terminated
from stn_fx.errors import StnError

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 130  # the shell's code for Ctrl-C
TERMINATED = 143  # and for SIGTERM


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command: a `StnError` exits with 1 and one message, Ctrl-C with 130, SIGTERM with 143; else it passes."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except StnError as error:
            Console(stderr=True).print(f"Error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            Console(stderr=True).print("Interrupted. What was written so far stays.", style="yellow")
            raise typer.Exit(TERMINATED if isinstance(error, Terminated) else INTERRUPTED) from error

    return wrapped
