"""What stands in, during capture, for code that torch.export cannot take as it is: forwards of recognised modules, and
functions that turn a tensor into a Python number.
"""

import builtins
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stn_fx.errors import CaptureError
from stn_fx.rules.drop_path import marked_forward


def stand_in(module: nn.Module) -> Callable[..., Any] | None:
    """Forward to capture this module by; None for its own."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None and module.track_running_stats:
        return _cumulative_average(module)
    return marked_forward(module)


def _cumulative_average(norm: nn.modules.batchnorm._BatchNorm) -> Callable[[Tensor], Tensor]:
    """A batch norm with ``momentum=None`` reads its counter as a Python number, which no graph can hold."""

    def forward(input: Tensor) -> Tensor:
        if not norm.training:
            mean, variance = norm.running_mean, norm.running_var
            return F.batch_norm(input, mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)
        assert norm.running_mean is not None, "track_running_stats"
        assert norm.running_var is not None, "track_running_stats"
        assert norm.num_batches_tracked is not None, "track_running_stats"
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            share = norm.num_batches_tracked.to(norm.running_mean.dtype).reciprocal()
            variance, mean = torch.var_mean(input, [0, *range(2, input.ndim)])
            norm.running_mean.add_((mean - norm.running_mean) * share)
            norm.running_var.add_((variance - norm.running_var) * share)
        return F.batch_norm(input, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)

    return forward


@contextlib.contextmanager
def functions_stand_in() -> Iterator[None]:
    """While this is open, sizes that ``len`` gives stay symbolic, torch's transformers do not look into masks, and an
    ``autograd.Function`` of the user's is told from what a graph can hold.
    """
    transformer, length = torch.nn.modules.transformer, builtins.len
    detect = transformer._detect_is_causal_mask

    def symbolic_length(value: Any, /) -> Any:
        """``len(x)`` of a tensor, which Python makes an integer: that would fix the batch size of the graph."""
        return value.shape[0] if isinstance(value, Tensor) and value.ndim else length(value)

    def declared(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        """Whether the caller says that the mask is causal: a hint for a faster kernel, the mask itself is used."""
        return bool(is_causal)

    apply = torch.autograd.Function.__dict__["apply"]

    def refused(cls: type, *args: Any, **kwargs: Any) -> Any:
        """A captured graph would hold the Function's forward only, and differentiate that."""
        if cls is torch.utils.checkpoint.CheckpointFunction:  # its forward runs without gradients
            function, _, *arguments = args
            return function(*arguments)
        if cls.__module__.partition(".")[0] in ("torch", "stn_fx"):
            return apply.__get__(None, cls)(*args, **kwargs)
        raise CaptureError(f"{cls.__name__} is a torch.autograd.Function, and a graph would lose its backward")

    builtins.len, transformer._detect_is_causal_mask = symbolic_length, declared
    torch.autograd.Function.apply = classmethod(refused)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        builtins.len, transformer._detect_is_causal_mask = length, detect
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]


class EvenChunks(TorchFunctionMode):
    """``chunk`` of a symbolic size that is a multiple of the number of parts gives that many equal parts.

    torch rounds sizes up there, and asks whether the last part is smaller: that would fix the batch size where two
    batches are concatenated, encoded at once and taken apart again, as siamese networks do.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.chunk, Tensor.chunk):
            return _chunked(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _chunked(func: Callable[..., Any], input: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    size = input.shape[dim]
    if isinstance(size, torch.SymInt) and chunks > 0 and (size.node.expr % chunks).is_zero:
        part = size // chunks
        return tuple(input.narrow(dim, index * part, part) for index in range(chunks))
    return func(input, chunks, dim)


class AllLayersRun(TorchFunctionMode):
    """Single random numbers are 1 while this is open, so that a forward can branch on them: layer drop skips nothing.

    A graph cannot hold ``if torch.rand([]) < self.layerdrop``, the way that speech models skip whole layers.
    """

    note = (
        "the forward draws single random numbers to decide in training which layers run (layer drop); no graph can "
        "hold that, so in training passes every layer runs"
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.rand and len(args) == 1 and args[0] in ((), []):
            self.seen = True
            return 1.0
        return func(*args, **(kwargs or {}))
