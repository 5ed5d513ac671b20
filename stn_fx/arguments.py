"""Checks of arguments that many places share."""

from numbers import Integral
from typing import Any

from stn_fx.errors import InputError


def require_count(name: str, value: Any, least: int = 1) -> None:
    """InputError unless `value` is a whole number, `least` or more; `name` is the argument's, for the message."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}={value!r}: a whole number is needed, {least} or more.")
