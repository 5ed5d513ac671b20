"""Values that a forward detaches, held fixed, so that a difference between two runs goes the way that gradients go."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Held(TorchFunctionMode):
    """Records what ``detach`` gives the first time that it is open, and gives the same again every other time."""

    def __init__(self) -> None:
        super().__init__()
        self._values: list[Tensor] = []
        self._next: int | None = None

    def __enter__(self) -> "Held":
        self._next = None if self._next is None else 0
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._next = 0
        super().__exit__(*exception)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.detach.default:
            return output
        if self._next is None:
            self._values.append(output.clone())
            return output
        self._next += 1
        return self._values[self._next - 1]
