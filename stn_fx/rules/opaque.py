"""Opaque leaves: modules that cannot be captured run as themselves, and a tangent passes through them all the same.

During capture such a module calls a marker operator, which brings it into the graph as a single node.  In the base pass
it is the user's live module, so its parameters are trained as ever; they do not respond, and a branch is taken for the
batch as a whole, as the module itself does.  In the linearized pass it is a function of its inputs: parameters
detached, buffers as they were, random draws repeated in the backward.
"""

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stn_fx.errors import CaptureError
from stn_fx.rules.as_found import attributes_as_found
from stn_fx.rules.rule import REGISTRY, Emitter, Rule
from stn_fx.rules.slots import slots
from stn_fx.rules.tangent import differentiable, linearize

_KEYS = itertools.count()
_LEAVES: "weakref.WeakValueDictionary[int, OpaqueLeaf]" = weakref.WeakValueDictionary()


@dataclass(eq=False)
class OpaqueLeaf:
    """One module that runs as itself.

    ``call`` holds the (args, kwargs) of its calls with every tensor replaced by None, ``output_shapes`` the sizes of
    its output tensors as (constant, multiple of the batch size) for every axis, ``batch_at`` where to read the batch
    size: (input, axis, multiple), None where no input carries it.
    """

    name: str
    module: nn.Module
    reason: str
    call: tuple[list[Any], pytree.TreeSpec]
    tensors_in: list[int]
    output: tuple[list[Any], pytree.TreeSpec]
    tensors_out: list[int]
    output_shapes: list[list[tuple[int, int]]]
    output_dtypes: list[torch.dtype]
    batch_at: tuple[int, int, int] | None
    forward_mode: bool = True
    """Whether the tangent goes through it by forward mode; else by central differences."""
    refusal: str = ""
    """The error where a tangent would have to pass and would be wrong; none comes to an augmentation of the input."""
    key: int = field(default_factory=lambda: next(_KEYS))

    def __post_init__(self) -> None:
        _LEAVES[self.key] = self

    def marked(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's call does during capture."""
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        device = next((tensor.device.type for tensor in tensors), "cpu")
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return self._outputs(opaque_marker(tensors, self.key, self.module.training, autocast))

    def arguments(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of a call on these tensors."""
        leaves, spec = list(self.call[0]), self.call[1]
        for index, tensor in zip(self.tensors_in, tensors, strict=True):
            leaves[index] = tensor
        return pytree.tree_unflatten(leaves, spec)

    def tensors_of(self, output: Any) -> list[Tensor]:
        """The tensors of an output, in order."""
        return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]

    def _outputs(self, tensors: list[Tensor]) -> Any:
        leaves, spec = list(self.output[0]), self.output[1]
        for index, tensor in zip(self.tensors_out, tensors, strict=True):
            leaves[index] = tensor
        return pytree.tree_unflatten(leaves, spec)


@torch.library.custom_op("stn_fx::opaque", mutates_args=())
def opaque_marker(inputs: list[Tensor], key: int, training: bool, autocast: torch.dtype | None) -> list[Tensor]:
    """Stands for an opaque leaf in a captured graph; run as it is, it evaluates without a trace."""
    with torch.no_grad():
        return [tensor.clone() for tensor in opaque_function(inputs, key, False, autocast)]


@opaque_marker.register_fake
def _(inputs: list[Tensor], key: int, training: bool, autocast: torch.dtype | None) -> list[Tensor]:
    leaf = _LEAVES[key]
    batch: Any = 0
    if leaf.batch_at is not None:
        index, axis, multiple = leaf.batch_at
        batch = inputs[index].shape[axis] // multiple if multiple != 1 else inputs[index].shape[axis]
    device = inputs[0].device if inputs else None
    return [
        torch.empty([constant + multiple * batch if multiple else constant for constant, multiple in sizes],
                    dtype=dtype, device=device)
        for sizes, dtype in zip(leaf.output_shapes, leaf.output_dtypes, strict=True)
    ]  # fmt: skip


def opaque_call(inputs: list[Tensor], key: int, autocast: torch.dtype | None) -> list[Tensor]:
    """Base pass: the user's module itself, in the mode that it is in."""
    leaf = _LEAVES[key]
    args, kwargs = leaf.arguments(inputs)
    with _autocast(inputs, autocast):
        return leaf.tensors_of(leaf.module(*args, **kwargs))


def opaque_respond(inputs: list[Tensor], key: int, autocast: torch.dtype | None) -> list[Tensor]:
    """Response pass: the user's module in evaluation mode."""
    with _in_mode(_LEAVES[key].module, False):
        return opaque_call(inputs, key, autocast)


def opaque_function(
    inputs: list[Tensor], key: int, training: bool, autocast: torch.dtype | None = None
) -> list[Tensor]:
    """The module as a function of its inputs: parameters detached, buffers and all attributes left as they are."""
    leaf = _LEAVES[key]
    args, kwargs = leaf.arguments(inputs)
    state = {
        name: tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
        for name, tensor in slots(leaf.module)
    }
    # A cached tensor would be one of functorch's, which outlives the pass and can be neither copied nor saved.
    with attributes_as_found(leaf.module), _in_mode(leaf.module, training), _autocast(inputs, autocast):
        return leaf.tensors_of(torch.func.functional_call(leaf.module, state, args, kwargs, tie_weights=False))


def opaque_linearized(
    inputs: list[Tensor], tangents: list[Tensor | None], key: int, training: bool, autocast: torch.dtype | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(outputs, tangents) of the module; an output that is not floating has no tangent."""
    generators = generator_states(inputs)
    active = [i for i, tangent in enumerate(tangents) if tangent is not None]
    floating = [i for i in active if differentiable(inputs[i])]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        arguments = list(inputs)
        for index, value in zip(floating, values, strict=True):
            arguments[index] = value
        with repeated_draws(generators):
            return tuple(opaque_function(arguments, key, training, autocast))

    with torch.no_grad():
        outputs = opaque_function(inputs, key, training, autocast)
    if not floating:
        return outputs, [None] * len(outputs)
    found = linearize(
        function,
        tuple(inputs[i] for i in floating),
        tuple(tangents[i] for i in floating),
        forward_mode=_LEAVES[key].forward_mode,
    )
    parts = iter(found if isinstance(found, tuple) else (found,))
    return outputs, [next(parts) if differentiable(output) else None for output in outputs]


@REGISTRY.register
class OpaqueRule(Rule):
    """Markers of opaque leaves."""

    name = "opaque"
    differentiable_primal = False
    targets = (torch.ops.stn_fx.opaque.default,)

    def base(self, emit: Emitter, node: Any) -> Any:
        return emit.call(opaque_call, emit.value(node.args[0]), node.args[1], node.args[3])

    def respond(self, emit: Emitter, node: Any) -> Any:
        return emit.call(opaque_respond, emit.value(node.args[0]), node.args[1], node.args[3])

    def linearize(self, emit: Emitter, node: Any) -> tuple[Any, Any]:
        inputs, key, training, autocast = node.args
        tangents = [emit.tangent(argument) for argument in inputs]
        if any(tangent is not None for tangent in tangents) and (error := _LEAVES[key].refusal):
            raise CaptureError(error)
        both = emit.call(opaque_linearized, emit.value(inputs), tangents, key, training, autocast)
        primal = emit.item(both, 0)
        if all(tangent is None for tangent in tangents):
            return primal, None
        return primal, emit.item(both, 1)


@contextlib.contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Evaluation mode throughout, or the modes that the module is in where it trains."""
    modes = [(each, each.training) for each in module.modules()]
    if not training:
        module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode


def _autocast(inputs: list[Tensor], dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast as it was where the module was called during capture; graphs run without."""
    device = inputs[0].device.type if inputs else "cpu"
    return contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype)


def generator_states(inputs: list[Tensor]) -> list[tuple[int | None, Tensor]]:
    """States of the global generators that a module on these devices may draw from; the CPU's has no index."""
    states: list[tuple[int | None, Tensor]] = [(None, torch.get_rng_state())]
    for index in {tensor.device.index for tensor in inputs if tensor.is_cuda}:
        states.append((index, torch.cuda.get_rng_state(index)))
    return states


@contextlib.contextmanager
def repeated_draws(states: list[tuple[int | None, Tensor]]) -> Iterator[None]:
    """The global generators as they were at ``states``, and afterwards as they are now."""
    with torch.random.fork_rng(devices=[index for index, _ in states if index is not None]):
        for index, state in states:
            if index is None:
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, index)
        yield
