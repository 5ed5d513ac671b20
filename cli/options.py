"""Values of options from text; each refuses what it does not understand with the forms that it does."""

import ast
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch.optim import SGD, Adam, Optimizer

from stn_fx import ImageFormat, LowRank, RowWise
from stn_fx.bilevel.schedules import SchedulerFactory, cosine, linear, warmup_cosine
from stn_fx.errors import InputError


class OptimizerName(StrEnum):
    """Values of --optimizer."""

    ADAM = "adam"
    SGD = "sgd"


class ScheduleName(StrEnum):
    """Values of --schedule."""

    COSINE = "cosine"
    LINEAR = "linear"
    WARMUP_COSINE = "warmup-cosine"
    CONSTANT = "constant"


OPTIMIZERS: dict[OptimizerName, Callable[..., Optimizer]] = {
    OptimizerName.ADAM: Adam,
    OptimizerName.SGD: partial(SGD, momentum=0.9),
}
SCHEDULES: dict[ScheduleName, SchedulerFactory | None] = {
    ScheduleName.COSINE: cosine,
    ScheduleName.LINEAR: linear,
    ScheduleName.WARMUP_COSINE: warmup_cosine,
    ScheduleName.CONSTANT: None,
}
DEFAULT_LR = {OptimizerName.ADAM: 1e-3, OptimizerName.SGD: 1e-2}
RESPONSE_HELP = "How weights respond: rowwise, rowwise:TERMS (dearer, more exact), or lowrank:RANK (cheaper)."


def parse_response(text: str) -> RowWise | LowRank:
    """`rowwise`, `rowwise:TERMS` or `lowrank:RANK`."""
    kind, _, count = text.partition(":")
    if text == "rowwise":
        return RowWise()
    if kind in ("rowwise", "lowrank") and count.isdecimal() and int(count) > 0:
        return RowWise(int(count)) if kind == "rowwise" else LowRank(int(count))
    raise InputError(
        f"--response {text!r} is neither 'rowwise' nor 'rowwise:TERMS' or 'lowrank:RANK' with a positive number, as "
        f"rowwise:2 or lowrank:8."
    )


def parse_image_format(text: str) -> ImageFormat:
    """`MEAN/STD`, each one number or one for every channel."""
    try:
        mean, std = (tuple(float(number) for number in part.split(",")) for part in text.split("/"))
    except ValueError:
        raise InputError(
            f"--image-format {text!r} is not of the form MEAN/STD, as 0.5/0.25 or 0.49,0.48,0.45/0.25,0.24,0.26."
        ) from None
    return ImageFormat(mean, std)


def parse_shape(text: str) -> tuple[int, ...]:
    """Sizes of one example, separated by commas or x."""
    parts = [part.strip() for part in text.replace("x", ",").split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(
            f"--input-shape {text!r} is not a list of sizes, as 3,32,32 (of one example, without the batch)."
        )
    return tuple(int(part) for part in parts)


def parse_device(text: str) -> torch.device:
    """A torch device that is there; `auto` is a GPU where there is one, else the CPU."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--device {text!r} cannot be used: {reason}. Use auto, cpu, or cuda where there is one."
        ) from error
    return device


def parse_arguments(texts: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` each; values are Python literals, anything else is a string."""
    arguments = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key.isidentifier():
            raise InputError(f"--model-arg {text!r} is not of the form KEY=VALUE, as img_size=32.")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key] = value
    return arguments
