"""Opaque leaves: what the calls of a module that cannot be captured look like, and proof of the tangent through it.

A module that torch.export cannot follow (a branch on the data's values, a backward of its own) is left out of the graph
and runs as itself, if the rest can be captured around it and the tangent through it is provably right.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stn_fx.compiler.casts import without_autocast
from stn_fx.errors import CaptureError
from stn_fx.rules.opaque import OpaqueLeaf, generator_states, opaque_function, repeated_draws
from stn_fx.rules.tangent import differentiable, linearize

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 3e-2}
"""Of a central difference against the derivative, by the precision that the module runs in."""


@dataclass
class _Call:
    arguments: list[Any]
    argument_spec: pytree.TreeSpec
    outputs: list[Any]
    output_spec: pytree.TreeSpec

    def shapes(self) -> list[torch.Size]:
        return [leaf.shape for leaf in self.arguments + self.outputs if isinstance(leaf, Tensor)]

    def constants(self) -> list[Any]:
        return [None if isinstance(leaf, Tensor) else leaf for leaf in self.arguments + self.outputs]


def opaque_leaf(
    model: nn.Module, name: str, reason: str, flat: list[Any], spec: pytree.TreeSpec, batch_axes: list[int | None]
) -> OpaqueLeaf:
    """Describe the calls of one module from two runs of the model with different batch sizes.

    Raises:
        CaptureError: the module cannot be left out, because its calls differ.  Where the tangent through it would be
            wrong, that is the leaf's `refusal`, for whoever has a tangent for it.
    """
    module = model.get_submodule(name)
    batch = next(v.shape[a] for v, a in zip(flat, batch_axes, strict=True) if a is not None)
    try:
        mode = not _calls(model, module, flat, spec)  # in training, where it runs in training only
        first = _calls(model, module, flat, spec, mode)
        second = _calls(model, module, one_more(flat, batch_axes), spec, mode)
    except Exception as error:  # whatever the user's code raises
        raise _refusal(name, reason, f"with one example more the model does not run ({error})") from error
    alike = first and len(first) == len(second)
    alike = alike and all(a.shapes() == first[0].shapes() for a in first)
    if not alike or any(a.constants() != b.constants() for a, b in zip(first, second, strict=True)):
        raise _refusal(name, reason, "its calls are not alike, or take numbers that differ with the batch size")
    call, other = first[0], second[0]
    sizes_in = _sizes(call.arguments, other.arguments, batch)
    sizes_out = _sizes(call.outputs, other.outputs, batch)
    if sizes_in is None or sizes_out is None or not call.outputs:
        raise _refusal(name, reason, "the sizes of its inputs or outputs are no multiples of the batch size")
    leaf = OpaqueLeaf(
        name, module, reason,
        ([None if isinstance(a, Tensor) else a for a in call.arguments], call.argument_spec), _tensors(call.arguments),
        ([None if isinstance(o, Tensor) else o for o in call.outputs], call.output_spec), _tensors(call.outputs),
        sizes_out, [o.dtype for o in call.outputs if isinstance(o, Tensor)],
        next(((i, a, m) for i, axes in enumerate(sizes_in) for a, (_, m) in enumerate(axes) if m), None),
    )  # fmt: skip
    with without_autocast(module):
        why = _doubt(leaf, [_in_full(a, module) for a in call.arguments if isinstance(a, Tensor)])
    leaf.refusal = str(_refusal(name, reason, why)) if why else ""
    return leaf


def _calls(
    model: nn.Module, module: nn.Module, flat: list[Any], spec: pytree.TreeSpec, training: bool = False
) -> list[_Call]:
    """Every call of ``module`` while the model runs in evaluation mode, or in training mode."""
    calls: list[_Call] = []

    def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(_Call(*pytree.tree_flatten((args, kwargs)), *pytree.tree_flatten(output)))

    handle = module.register_forward_hook(note, with_kwargs=True)
    args, kwargs = pytree.tree_unflatten(flat, spec)
    model.train(training)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        handle.remove()
    return calls


def one_more(flat: list[Any], batch_axes: list[int | None]) -> list[Any]:
    """The inputs with their first example once more at the end."""
    return [v if a is None else torch.cat([v, v.narrow(a, 0, 1)], a) for v, a in zip(flat, batch_axes, strict=True)]


def _sizes(first: list[Any], second: list[Any], batch: int) -> list[list[tuple[int, int]]] | None:
    """Every axis of every tensor as (constant, multiple of the batch size), one of the two zero; None if it is not."""
    found = []
    for a, b in zip(first, second, strict=True):
        if not isinstance(a, Tensor):
            continue
        multiples = [after - before for before, after in zip(a.shape, b.shape, strict=True)]
        if any(m and m * batch != size for m, size in zip(multiples, a.shape, strict=True)):
            return None
        found.append([(0, m) if m else (size, 0) for m, size in zip(multiples, a.shape, strict=True)])
    return found


def _tensors(leaves: list[Any]) -> list[int]:
    return [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]


def _doubt(leaf: OpaqueLeaf, inputs: list[Tensor]) -> str:
    """Choose how the tangent passes, and why it cannot, by central differences of the evaluated module."""
    floating = [i for i, value in enumerate(inputs) if differentiable(value)]
    generator, states = torch.Generator().manual_seed(0), generator_states(inputs)
    primals = tuple(inputs[i].detach() for i in floating)
    directions = tuple(torch.randn(p.shape, generator=generator).to(p) for p in primals)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        arguments = list(inputs)
        for index, value in zip(floating, values, strict=True):
            arguments[index] = value
        with repeated_draws(states):  # augmentations may draw in evaluation mode too
            outputs = opaque_function(arguments, leaf.key, False)
        return tuple(output for output in outputs if differentiable(output))

    if not floating or not function(*primals):
        return ""
    differences = _tuple(linearize(function, primals, directions, forward_mode=False))
    cotangents = tuple(torch.randn(d.shape, generator=generator).to(d) for d in differences)
    expected = _inner(cotangents, differences)
    size = max(sum(_norm(c) * _norm(d) for c, d in zip(cotangents, differences, strict=True)), 1e-6)
    tolerance = _TOLERANCE.get(primals[0].dtype, 0.1) * size
    try:
        leaf.forward_mode = (
            abs(_inner(cotangents, _tuple(linearize(function, primals, directions))) - expected) < tolerance
        )
    except (RuntimeError, NotImplementedError):
        leaf.forward_mode = False
    live = tuple(p.clone().requires_grad_() for p in primals)
    outputs = [(o, c) for o, c in zip(function(*live), cotangents, strict=True) if o.requires_grad]
    pulled: tuple[Any, ...] = (None,)
    if outputs:
        try:
            pulled = torch.autograd.grad([o for o, _ in outputs], live, [c for _, c in outputs], allow_unused=True)
        except RuntimeError as error:  # it wrote over what its backward needs
            return f"its gradient cannot be computed ({error})"
    adjoint = sum(float((g.conj() * d).sum().real) for g, d in zip(pulled, directions, strict=False) if g is not None)
    if abs(adjoint - expected) >= tolerance:
        return (
            f"its gradient is not the derivative of its forward ({adjoint:.3g} against {expected:.3g} by differences)"
        )
    return ""


def _in_full(value: Tensor, module: nn.Module) -> Tensor:
    """What autocast has cast down is cast up again, since differences need the precision."""
    low = (torch.bfloat16, torch.float16)
    return value if value.dtype not in low or any(p.dtype in low for p in module.parameters()) else value.float()


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _inner(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> float:
    return float(sum((a.conj() * b).sum().real for a, b in zip(left, right, strict=True)))


def _norm(value: Tensor) -> float:
    return float(value.norm())


def _refusal(name: str, reason: str, why: str) -> CaptureError:
    return CaptureError(
        f"{name} cannot be captured ({reason}), and it cannot run as itself inside the captured model either: {why}. "
        f"Remedy: write {name} without branches on values and without a backward of its own, or give it a rule "
        f"(examples/custom_rule.py)."
    )
