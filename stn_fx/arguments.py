"""Checks of arguments that many places share."""

from collections.abc import Mapping
from functools import partial
from numbers import Integral
from typing import Any

from torch import nn

from stn_fx.errors import InputError


def require_count(name: str, value: Any, least: int = 1) -> None:
    """InputError unless `value` is a whole number, `least` or more; `name` is the argument's, for the message."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}={value!r}: a whole number is needed, {least} or more.")


def described(function: Any) -> str:
    """What tells two functions, partials or modules apart from one process to the next: no addresses in memory."""
    if isinstance(function, partial):
        return f"{described(function.func)}({_settings(function.keywords)})"
    if isinstance(function, nn.Module):
        own = {name: value for name, value in vars(function).items() if name != "training" and name[:1] != "_"}
        return f"{type(function).__qualname__}({_settings(own)})"
    return getattr(function, "__qualname__", type(function).__qualname__)


def _settings(given: Mapping[str, Any]) -> str:
    """Those that are plain values."""
    return ", ".join(f"{name}={value}" for name, value in given.items() if isinstance(value, (bool, int, float, str)))
