"""Where in the user's model an error was raised: the innermost module whose forward was running, and its line."""

import linecache
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from torch import nn


@dataclass(frozen=True)
class FailingPlace:
    """Qualified name of a module ("" is the model itself), and the line of its forward as text."""

    module: str
    line: str


def failing_place(error: BaseException, model: nn.Module) -> FailingPlace | None:
    """Where ``error`` or what caused it was raised; None where no forward of the model was running."""
    # torch.export runs forward on a proxy of the module, which shares its attributes.
    names = {id(vars(module)): name for name, module in model.named_modules()}
    for each in _causes(error):
        found = None
        trace = each.__traceback__
        while trace is not None:
            name = names.get(_attributes_of_self(trace.tb_frame))
            if name is not None and trace.tb_frame.f_code.co_name == "forward":
                found = FailingPlace(name, _line(trace.tb_frame, trace.tb_lineno))
            trace = trace.tb_next
        if found is not None:
            return found
    return None


def root_cause(error: BaseException) -> BaseException:
    """The error that all others were raised from."""
    return next(_causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, the first one first."""
    if error.__cause__ is not None:
        yield from _causes(error.__cause__)
    yield error


def _attributes_of_self(frame: FrameType) -> int | None:
    owner = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))
    return id(vars(owner)) if isinstance(owner, nn.Module) else None


def _line(frame: FrameType, number: int) -> str:
    file = frame.f_code.co_filename
    return f"{file}:{number}: {linecache.getline(file, number).strip()}"
