"""How a tangent passes through an operator: forward by jvp, backward by vjp at the primal.

With the base detached, the tangent is a *linear* function of the response, so its backward never needs a derivative of
a derivative formula: it is the vjp of the operator at the primal.  That is exact where autograd's double backward is
missing (hardsigmoid, glu), silently NaN (the norm of a zero row) or silently wrong (norms, pytorch issues 196699 and
196700), and it lets fused backward kernels serve as forward ones where the Jacobian is symmetric.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

TensorFunction = Callable[..., Any]


class _LinearizedOperator(torch.autograd.Function):
    """``J(primals) tangents`` of a tensor function, with the adjoint ``J(primals)^T`` as its backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: TensorFunction, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(tensors) // 2
        return torch.func.jvp(_as_tuple(function), tensors[:count], tensors[count:])[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        function, *tensors = inputs
        ctx.function, ctx.count = function, len(tensors) // 2
        ctx.save_for_backward(*tensors[: ctx.count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        _, pullback = torch.func.vjp(_as_tuple(ctx.function), *ctx.saved_tensors)[:2]
        return (None, *(None,) * ctx.count, *pullback(cotangents))


class _DifferencedOperator(torch.autograd.Function):
    """The same for an operator without forward mode: forward by central differences, backward by autograd."""

    @staticmethod
    def forward(function: TensorFunction, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(tensors) // 2
        primals, tangents = tensors[:count], tensors[count:]
        step = _difference_step(primals, tangents)
        with torch.no_grad():
            ahead, behind = (
                _as_tuple(function)(*(p + sign * step * t for p, t in zip(primals, tangents, strict=True)))
                for sign in (1, -1)
            )
        return tuple((a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _LinearizedOperator.setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            primals = [p.detach().requires_grad_() for p in ctx.saved_tensors]
            outputs = _as_tuple(ctx.function)(*primals)
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        if not pairs:
            return (None, *(None,) * (2 * ctx.count))
        found = torch.autograd.grad([o for o, _ in pairs], primals, [c for _, c in pairs], allow_unused=True)
        return (None, *(None,) * ctx.count, *found)


def _difference_step(primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """Step of a central difference: the cube root of the precision, at the scale of the primals."""
    scale = torch.stack([p.abs().max() for p in primals]).max().clamp(min=1.0)
    length = torch.stack([t.abs().max() for t in tangents]).max()
    return torch.finfo(length.dtype).eps ** (1 / 3) * scale / torch.where(length > 0, length, 1.0)


def linearize(
    function: TensorFunction,
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor | None, ...],
    forward_mode: bool = True,
) -> Any:
    """Tangent of ``function(*primals)`` along ``tangents`` (None = zero); a tensor, or a tuple for several outputs.

    Only floating outputs have one.  Without ``forward_mode`` it is a central difference.
    """
    active = [i for i, tangent in enumerate(tangents) if tangent is not None]

    def on_active(*values: Tensor) -> Any:
        arguments = list(primals)
        for index, value in zip(active, values, strict=True):
            arguments[index] = value
        return function(*arguments)

    load_forward_mode()
    # Forward mode refuses values that overlap in memory, such as expanded ones.
    inputs = [primals[i].detach().contiguous() for i in active]
    directions = [tangents[i].contiguous() for i in active]  # type: ignore[union-attr]
    operator = _LinearizedOperator if forward_mode else _DifferencedOperator
    outputs = operator.apply(_floating_outputs(on_active), *inputs, *directions)
    return outputs[0] if len(outputs) == 1 else outputs


@cache
def load_forward_mode() -> None:
    """Torch loads its forward-mode rules at the first use, and then warns about its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with torch.autograd.forward_ad.dual_level():
            pass


def differentiable(value: Any) -> bool:
    """Whether a value can have a tangent: floating and complex tensors do."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def pointwise(function: TensorFunction, primal: Tensor, tangent: Tensor) -> Tensor:
    """Tangent of an element-wise function of one tensor: its derivative is evaluated once and multiplied."""
    _, pullback = torch.func.vjp(function, primal.detach())[:2]
    with torch.no_grad():
        (derivative,) = pullback(torch.ones_like(primal))
    return tangent * derivative


def _as_tuple(function: TensorFunction) -> TensorFunction:
    def wrapped(*values: Tensor) -> tuple[Tensor, ...]:
        output = function(*values)
        return output if isinstance(output, tuple) else (output,)

    return wrapped


def _floating_outputs(function: TensorFunction) -> TensorFunction:
    def wrapped(*values: Tensor) -> tuple[Tensor, ...]:
        output = function(*values)
        outputs = tuple(output) if isinstance(output, (tuple, list)) else (output,)
        return tuple(item for item in outputs if differentiable(item))

    return wrapped
