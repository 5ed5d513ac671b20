"""Capture: an unmodified module and one example batch -> two functional ATen graphs, training and evaluation.

Each graph is a function of (state, inputs): parameters, buffers and constants are placeholders that know their
qualified names.  The user's module, its modes, hooks, parameters and the global generators are as before, also when
capture fails.
"""

import contextlib
import dataclasses
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from stn_fx.compiler.casts import ambient_autocast, cast_explicitly
from stn_fx.compiler.cells import expand_cells
from stn_fx.compiler.failures import failing_place, root_cause
from stn_fx.compiler.functionalize import NO_GRAD, functionalize
from stn_fx.compiler.opaque_leaves import opaque_leaf
from stn_fx.compiler.stand_ins import functions_stand_in, stand_in
from stn_fx.errors import CaptureError, InputError
from stn_fx.rules.opaque import OpaqueLeaf

aten = torch.ops.aten


@dataclass
class CapturedGraph:
    """One functional graph.

    ``state``: placeholder name -> qualified name of a parameter, buffer or constant; ``inputs``: placeholder names of
    the flattened user inputs, in order; ``buffer_updates``: qualified name of a buffer -> node of its new value;
    ``batch_symbol``: the symbol of the batch size in the shapes.
    """

    graph: Graph
    training: bool
    state: dict[str, str]
    inputs: list[str]
    buffer_updates: dict[str, Node]
    batch_symbol: Any
    output_spec: pytree.TreeSpec

    def unflatten(self, outputs: list[Any]) -> Any:
        """The outputs in the structure that the user's model returns."""
        return pytree.tree_unflatten(list(outputs), self.output_spec)

    def placeholders(self) -> dict[str, Node]:
        """Placeholder nodes by name."""
        return {node.name: node for node in self.graph.nodes if node.op == "placeholder"}


@dataclass
class CapturedModel:
    """Both graphs of a model, with what is common to them."""

    training: CapturedGraph
    evaluation: CapturedGraph
    input_spec: pytree.TreeSpec
    batch_axes: list[int | None]
    example: list[Any]
    training_flags: tuple[bool, ...] = ()
    constants: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    opaque: list[OpaqueLeaf] = field(default_factory=list)
    """Modules that run as themselves."""

    def batch_size(self, inputs: list[Any]) -> int:
        """Number of examples in flattened inputs."""
        return next(int(v.shape[a]) for v, a in zip(inputs, self.batch_axes, strict=True) if a is not None)


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch_axes: list[int | None]) -> Any:
    """Capture ``model`` in both modes with a dynamic batch.

    ``batch_axes`` names the batch axis of every flattened input (None = not batched).

    Raises:
        CaptureError: with the place and the reason that torch.export gives.
    """
    flat, spec = pytree.tree_flatten((args, kwargs))
    notes: list[str] = []
    flat = _at_least_two_examples(flat, batch_axes, notes)
    args, kwargs = pytree.tree_unflatten(flat, spec)
    with _left_as_found(model):
        _register_dataclasses(model, args, kwargs)
    leaves: dict[str, OpaqueLeaf] = {}
    while True:
        try:
            return _capture_around(model, flat, spec, batch_axes, leaves, notes)
        except CaptureError as error:
            place = failing_place(error, model)
            if place is None or not place.module or place.module in leaves:
                raise
            reason = f"{place.line}: {_first_lines(root_cause(error), 1)}"
            with _left_as_found(model):
                leaves[place.module] = opaque_leaf(model, place.module, reason, flat, spec, batch_axes)


def _capture_around(
    model: nn.Module,
    flat: list[Any],
    spec: pytree.TreeSpec,
    batch_axes: list[int | None],
    leaves: dict[str, OpaqueLeaf],
    notes: list[str],
) -> CapturedModel:
    """Capture both graphs with ``leaves`` left out."""
    args, kwargs = pytree.tree_unflatten(flat, spec)
    constants: dict[str, Tensor] = {}
    graphs = {}
    for training in (True, False):
        with _left_as_found(model), _markers(model, leaves):
            _set_mode(model, training)
            if training:
                flags = tuple(module.training for module in model.modules())
            program = _export(model, args, kwargs, flat, batch_axes, training)
            constants.update({name: value for name, value in program.constants.items() if isinstance(value, Tensor)})
            graphs[training] = _to_captured(program, model, training, batch_axes)
    used = list(leaves.values())
    return CapturedModel(graphs[True], graphs[False], spec, batch_axes, flat, flags, constants, notes, used)


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    flat: list[Any],
    batch_axes: list[int | None],
    training: bool,
) -> torch.export.ExportedProgram:
    shapes = torch.export.ShapesCollection()
    batch = torch.export.Dim("batch")
    for value, axis in zip(flat, batch_axes, strict=True):
        if axis is not None:
            shapes[value] = {axis: batch}
    try:
        with _quietly(), _named_keywords(model, kwargs):
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        mode = "training" if training else "evaluation"
        place = failing_place(error, model)
        where = f" At {place.module or 'the model itself'}, {place.line}" if place is not None else ""
        raise CaptureError(
            f"{type(model).__name__} could not be captured in {mode} mode with a dynamic batch.{where}\n"
            f"Reason: {_first_lines(error)}\nRemedy: make the forward independent of the data's values and of the "
            f"batch size, name the batch axis with batch_axis=, or pass inputs of the usual shape."
        ) from error


@contextlib.contextmanager
def _named_keywords(model: nn.Module, kwargs: dict[str, Any]) -> Iterator[None]:
    """Give a forward that takes ``**kwargs`` named arguments: torch.export before 2.13 cannot match shapes then."""
    signature = inspect.signature(model.forward)
    collecting = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    if not collecting or set(kwargs) <= set(signature.parameters):
        yield
        return
    rest = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    named = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in kwargs if n not in signature.parameters]

    def forward(*args: Any, **keywords: Any) -> Any:
        return original(*args, **keywords)

    had_own, original = "forward" in vars(model), model.forward
    forward.__signature__ = signature.replace(parameters=[*rest, *named])  # type: ignore[attr-defined]
    model.forward = forward
    try:
        yield
    finally:
        if had_own:
            model.forward = original
        else:
            del model.forward


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's warnings, and without what it logs and prints about a failure: the error says that as well."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _first_lines(error: BaseException, count: int = 8) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: " + "\n  ".join(lines[:count])


def _to_captured(
    program: torch.export.ExportedProgram, model: nn.Module, training: bool, batch_axes: list[int | None]
) -> CapturedGraph:
    signature = program.graph_signature
    state = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    graph = _inline_regions(program.graph_module)
    _drop_assertions(graph)
    expand_cells(graph)
    if ambient_autocast(model) is not None or "wrap_with_autocast" in {_operator(node) for node in _all_nodes(program)}:
        cast_explicitly(graph, model)
    inputs = [node.name for node in graph.nodes if node.op == "placeholder" and node.name not in state]
    graph, updates = functionalize(graph, dict(signature.inputs_to_buffers))
    kept = set(updates.values())
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or node in kept)
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    symbol = None
    for name, axis in zip(inputs, batch_axes, strict=True):
        if axis is not None:
            symbol = placeholders[name].meta["val"].shape[axis].node.expr
    updates = {state[name]: node for name, node in updates.items()}
    return CapturedGraph(graph, training, state, inputs, updates, symbol, program.call_spec.out_spec)


def _inline_regions(module: torch.fx.GraphModule) -> Graph:
    """Copy of the graph in which ``no_grad`` and autocast regions are inlined; gradients stop at a no_grad region."""
    graph = Graph()

    def copy(source: torch.fx.GraphModule, env: dict[Node, Any]) -> Any:
        for node in source.graph.nodes:
            if node.op == "output":
                return torch.fx.node.map_arg(node.args[0], lambda n: env[n])
            if node.op == "get_attr":
                value = getattr(source, node.target)
                env[node] = value if isinstance(value, torch.fx.GraphModule) else graph.node_copy(node)
            elif node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
                env[node] = inline(node, env)
            elif node.op == "call_function" and _indexes_region(node, env):
                env[node] = env[node.args[0]][node.args[1]]
            elif node not in env:
                env[node] = graph.node_copy(node, lambda n: env[n])
        return None

    def inline(node: Node, env: dict[Node, Any]) -> Any:
        bodies = [a for a in node.args if isinstance(a, Node) and isinstance(env.get(a), torch.fx.GraphModule)]
        if node.target.name() not in ("wrap_with_set_grad_enabled", "wrap_with_autocast") or len(bodies) != 1:
            raise CaptureError(
                f"The forward uses {node.target.name()}, which stn_fx cannot look into. Remedy: write it as plain "
                f"tensor code, or leave that module out of the captured forward."
            )
        body = env[bodies[0]]
        operands = node.args[node.args.index(bodies[0]) + 1 :]
        holders = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        inner_env = dict(zip(holders, torch.fx.node.map_arg(operands, lambda n: env[n]), strict=True))
        without_grad = node.target.name() == "wrap_with_set_grad_enabled" and not node.args[0]
        if without_grad:
            for part in body.modules():
                for inner in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
                    inner.meta[NO_GRAD] = True
        outputs = copy(body, inner_env)
        if without_grad:
            outputs = [_detached(graph, output) for output in outputs]
        return list(outputs)

    graph.output(copy(module, {}))
    return graph


def _indexes_region(node: Node, env: dict[Node, Any]) -> bool:
    return node.target.__name__ == "getitem" and isinstance(env.get(node.args[0]), list)


def _detached(graph: Graph, node: Any) -> Any:
    if not isinstance(node, Node) or not isinstance(node.meta.get("val"), Tensor):
        return node
    detached = graph.call_function(aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    return detached


def _all_nodes(program: torch.export.ExportedProgram) -> Iterator[Node]:
    for module in program.graph_module.modules():
        yield from module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ()


def _operator(node: Node) -> str:
    return node.target.name() if isinstance(node.target, torch._ops.HigherOrderOperator) else ""


def _drop_assertions(graph: Graph) -> None:
    """Remove run-time assertions: they hold for the captured shapes, and whatever is left is told by the operators."""
    for node in reversed(list(graph.nodes)):
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and not node.users and ("assert" in name or "sym_constrain" in name):
            graph.erase_node(node)


def _at_least_two_examples(flat: list[Any], batch_axes: list[int | None], notes: list[str]) -> list[Any]:
    sizes = {v.shape[a] for v, a in zip(flat, batch_axes, strict=True) if a is not None}
    if not sizes:
        raise InputError("No input has a batch axis. Pass at least one tensor that holds a batch of examples.")
    if len(sizes) > 1:
        raise InputError(
            f"The inputs disagree on the batch size: {sorted(sizes)}. Name every input's batch axis with batch_axis=."
        )
    # Distinct tensors, so that each gets its own dynamic dimension, detached from the caller's graph.
    flat = [v.detach().clone() if isinstance(v, Tensor) else v for v in flat]
    if sizes != {1}:
        return flat
    notes.append("the example batch had one row; it was repeated, since capture would fix a batch of one")
    return [v if a is None else torch.cat([v, v], a) for v, a in zip(flat, batch_axes, strict=True)]


def _set_mode(model: nn.Module, training: bool) -> None:
    """Evaluation everywhere; for training keep submodules that the user holds in evaluation mode inside it."""
    if training and model.training:
        return
    model.train()  # also before eval(): models that cache tensors for evaluation drop them here
    if not training:
        model.eval()


@contextlib.contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Modes, attributes, global generators and the attention fast path as before, whatever happens inside.

    Attributes too: some models cache tensors in forward, and a cached tensor of the tracer would stay in the model.
    """
    attributes = {module: _copied_attributes(module) for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=[d for d in devices if d is not None]):
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, (values, contents) in attributes.items():
            module.__dict__.clear()
            module.__dict__.update(values)
            for container, content in contents:
                container.clear()
                container.update(content)


def _copied_attributes(module: nn.Module) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """The module's attributes, and the contents of its dicts and sets (parameters, buffers, hooks, own caches)."""
    values = dict(module.__dict__)
    return values, [(value, value.copy()) for value in values.values() if isinstance(value, (dict, set))]


@contextlib.contextmanager
def _markers(model: nn.Module, leaves: dict[str, OpaqueLeaf]) -> Iterator[None]:
    """Recognised modules and opaque leaves call their marker while this is open."""
    patched = []
    try:
        for module in model.modules():
            forward = stand_in(module)
            if forward is not None and "forward" not in vars(module):
                module.__dict__["forward"] = forward
                patched.append(module)
        for leaf in leaves.values():
            leaf.module.__dict__["_call_impl"] = leaf.marked  # hooks too belong to what runs as itself
        with functions_stand_in():
            yield
    finally:
        for module in patched:
            del module.__dict__["forward"]
        for leaf in leaves.values():
            del leaf.module.__dict__["_call_impl"]


def _register_dataclasses(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Dataclasses among inputs and outputs must be known to torch's pytree before export."""
    training = {module: module.training for module in model.modules()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    model.eval()
    try:
        with torch.no_grad():
            output = model(*args, **kwargs)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} does not run on the example inputs: {_first_lines(error, 3)}\nRemedy: pass "
            f"example_inputs of the shape, dtype and device that the model expects."
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers and not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])
    register_dataclasses(output)


def register_dataclasses(value: Any) -> None:
    """Make the dataclasses in a nested value known to torch's pytree, which export and flattening rest on."""
    if isinstance(value, (tuple, list)):
        for item in value:
            register_dataclasses(item)
    elif isinstance(value, dict):
        for item in value.values():
            register_dataclasses(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value) not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(type(value))
        for each in dataclasses.fields(value):
            register_dataclasses(getattr(value, each.name))
