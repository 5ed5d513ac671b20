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
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from stn_fx.compiler.augmentation_modules import whole_augmentation
from stn_fx.compiler.casts import ambient_autocast, cast_explicitly
from stn_fx.compiler.cells import expand_cells
from stn_fx.compiler.failures import FailingPlace, failing_place, root_cause
from stn_fx.compiler.functionalize import NO_GRAD, functionalize, module_path, writes_statistics
from stn_fx.compiler.module_outputs import is_output_marker, marked_outputs, take_outputs
from stn_fx.compiler.opaque_leaves import one_more, opaque_leaf
from stn_fx.compiler.preconditions import require_output
from stn_fx.compiler.recurrent_markers import PACKED_REMEDY, packs_sequences, recurrent_markers
from stn_fx.compiler.recurrent_networks import expand_recurrent_networks
from stn_fx.compiler.stand_ins import AllLayersRun, EvenChunks, functions_stand_in, stand_in
from stn_fx.errors import CaptureError, InputError
from stn_fx.rules.as_found import buffers_as_found, left_as_found
from stn_fx.rules.layout import BatchLayout
from stn_fx.rules.opaque import OpaqueLeaf

aten = torch.ops.aten

Forward = Callable[..., Any]


@dataclass
class CapturedGraph:
    """One functional graph.

    ``state``: placeholder name -> qualified name of a parameter, buffer or constant; ``inputs``: placeholder names of
    the flattened user inputs, in order; ``buffer_updates``: qualified name of a buffer -> node of its new value;
    ``batch_symbol``: the symbol of the batch size in the shapes; ``module_outputs``: name of a module that was asked
    for -> its outputs, one for each call; ``layouts``: number of nodes and their layouts, once they were analysed.
    """

    graph: Graph
    training: bool
    state: dict[str, str]
    inputs: list[str]
    buffer_updates: dict[str, Node]
    batch_symbol: Any
    output_spec: pytree.TreeSpec
    module_outputs: dict[str, list[Node]] = field(default_factory=dict)
    layouts: tuple[int, dict[Node, BatchLayout]] | None = None

    def unflatten(self, outputs: list[Any]) -> Any:
        """The outputs in the structure that the user's model returns."""
        return pytree.tree_unflatten(list(outputs), self.output_spec)

    def output_nodes(self) -> list[Node]:
        """What the model returns, flattened."""
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        return [node for node in output.args[0] if isinstance(node, Node)]  # type: ignore[union-attr]

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


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch_axes: list[int | None],
    watched: Collection[str] = (),
    augmentations: Mapping[str, Forward] | None = None,
) -> Any:
    """Capture ``model`` in both modes with a dynamic batch.

    ``batch_axes`` names the batch axis of every flattened input (None = not batched); ``watched`` the modules whose
    outputs are wanted as nodes of the training graph, ``augmentations`` forwards by module to capture that one by.

    Raises:
        CaptureError: with the place and the reason that torch.export gives.
    """
    flat, spec = pytree.tree_flatten((args, kwargs))
    notes: list[str] = []
    flat = _at_least_two_examples(flat, batch_axes, notes)
    with left_as_found(model):
        _try_out(model, flat, spec, batch_axes)
    leaves: dict[str, OpaqueLeaf] = {}
    while True:
        try:
            return _capture_around(model, flat, spec, batch_axes, leaves, notes, watched, augmentations or {})
        except CaptureError as error:
            place = failing_place(error, model) or FailingPlace(error.module, "")
            place = FailingPlace(whole_augmentation(model, place.module), place.line)
            if not place.module or place.module in leaves or PACKED_REMEDY in str(error):
                raise
            reason = f"{_in_short(root_cause(error))}, {place.line}" if place.line else str(error)
            with left_as_found(model), buffers_as_found(model):
                leaves[place.module] = opaque_leaf(model, place.module, reason, flat, spec, batch_axes)


def _capture_around(
    model: nn.Module,
    flat: list[Any],
    spec: pytree.TreeSpec,
    batch_axes: list[int | None],
    leaves: dict[str, OpaqueLeaf],
    notes: list[str],
    watched: Collection[str],
    augmentations: Mapping[str, Forward],
) -> CapturedModel:
    """Capture both graphs with ``leaves`` left out."""
    args, kwargs = pytree.tree_unflatten(flat, spec)
    constants: dict[str, Tensor] = {}
    graphs = {}
    for training in (True, False):
        outputs = marked_outputs(model, watched if training else ())
        with (
            left_as_found(model),
            _markers(model, leaves, augmentations if training else {}),
            recurrent_markers(),
            outputs,
        ):
            _set_mode(model, training)
            if training:
                flags = tuple(module.training for module in model.modules())
            program = _export(model, args, kwargs, flat, batch_axes, training, notes)
            constants.update({name: value for name, value in program.constants.items() if isinstance(value, Tensor)})
            graphs[training] = _to_captured(program, model, training, batch_axes)
    skipped = _parameters_used(graphs[False], model) - _parameters_used(graphs[True], model)
    if AllLayersRun.note in notes and skipped:
        raise CaptureError(
            f"{type(model).__name__} draws single random numbers in training to decide what runs, and "
            f"{sorted(skipped)[0]} is left out where the number is 1.\nRemedy: write the condition so that small "
            f"numbers skip (`torch.rand([]) < p`), or draw no layers in training."
        )
    used = list(leaves.values())
    return CapturedModel(graphs[True], graphs[False], spec, batch_axes, flat, flags, constants, notes, used)


def _parameters_used(captured: CapturedGraph, model: nn.Module) -> set[str]:
    placeholders, parameters = captured.placeholders(), dict(model.named_parameters(remove_duplicate=False))
    return {name for node, name in captured.state.items() if name in parameters and placeholders[node].users}


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    flat: list[Any],
    batch_axes: list[int | None],
    training: bool,
    notes: list[str],
) -> torch.export.ExportedProgram:
    def export() -> torch.export.ExportedProgram:
        with _quietly(), _named_keywords(model, kwargs), _one_batch_size(model, args, kwargs, batch_axes):
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)

    shapes = torch.export.ShapesCollection()
    batch = torch.export.Dim("batch")
    for value, axis in zip(flat, batch_axes, strict=True):
        if axis is not None:
            shapes[value] = {axis: batch}
    try:
        return export()
    except Exception as error:
        if packs_sequences(error):
            raise CaptureError(f"{type(model).__name__}: {PACKED_REMEDY}") from error
        if training and isinstance(error, GuardOnDataDependentSymNode):
            with contextlib.suppress(Exception), AllLayersRun() as draws:
                program = export()
                if draws.seen:
                    notes.append(draws.note)
                return program
        mode = "training" if training else "evaluation"
        if "Constraints violated (batch)" in str(error):
            raise _fixed_batch(model, args, kwargs, flat, batch_axes) from error
        raise CaptureError(
            f"{type(model).__name__} could not be captured in {mode} mode with a dynamic batch{_at(error, model)}.\n"
            f"Reason: {_first_lines(error)}\nRemedy: make the forward independent of the data's values and of the "
            f"batch size, name the batch axis with batch_axis=, or pass inputs of the usual shape."
        ) from error


def _at(error: BaseException, model: nn.Module) -> str:
    place = failing_place(error, model)
    return "" if place is None else f", at {place.module or 'the model itself'} ({place.line})"


def _fixed_batch(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    flat: list[Any],
    batch_axes: list[int | None],
) -> CaptureError:
    """The model takes batches of one size only; run with one example more, it may say where."""
    size = next(v.shape[a] for v, a in zip(flat, batch_axes, strict=True) if a is not None)
    where = ""
    model.eval()
    try:
        more = pytree.tree_unflatten(one_more(flat, batch_axes), pytree.tree_structure((args, kwargs)))
        with torch.no_grad(), buffers_as_found(model):
            model(*more[0], **more[1])
    except Exception as other:
        where = _at(other, model)
    return CaptureError(
        f"{type(model).__name__} fixes the batch size to {size}{where}.\nRemedy: take it from the input where it is "
        f"needed, as in x.view(x.shape[0], -1), without int(), range() or a loop over the examples; or name the batch "
        f"axis with batch_axis=, if it is not the one of size {size}."
    )


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
def _one_batch_size(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch_axes: list[int | None]
) -> Iterator[None]:
    """Tell torch.export at the start that all inputs have the same batch size: it gives each a symbol of its own."""
    own, named = pytree.tree_unflatten(batch_axes, pytree.tree_structure((args, kwargs)))

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [(args, own), *((kwargs[name], named[name]) for name in kwargs)]
        pairs = [pair for each in given for pair in zip(*map(pytree.tree_leaves, each), strict=True)]
        first, *others = [value.shape[axis] for value, axis in pairs if axis is not None]
        for size in others:
            torch._check(size == first)

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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


def _in_short(error: BaseException) -> str:
    """The usual causes in the user's words."""
    if "DataDependent" in type(error).__name__:
        return "a branch or a number that depends on the data's values"
    return str(error) if isinstance(error, CaptureError) else _first_lines(error, 1)


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
    expand_recurrent_networks(graph)
    if ambient_autocast(model) is not None or "wrap_with_autocast" in {_operator(node) for node in _all_nodes(program)}:
        cast_explicitly(graph, model)
    inputs = [node.name for node in graph.nodes if node.op == "placeholder" and node.name not in state]
    graph, updates = functionalize(graph, dict(signature.inputs_to_buffers))
    kept = set(updates.values())
    graph.eliminate_dead_code(
        is_impure_node=lambda node: (
            node.op in ("placeholder", "output") or node in kept or is_output_marker(node) or writes_statistics(node)
        )
    )
    outputs = take_outputs(graph)
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    symbol = None
    for name, axis in zip(inputs, batch_axes, strict=True):
        if axis is not None:
            symbol = placeholders[name].meta["val"].shape[axis].node.expr
    updates = {state[name]: node for name, node in updates.items()}
    return CapturedGraph(graph, training, state, inputs, updates, symbol, program.call_spec.out_spec, outputs)


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
                f"tensor code, or leave that module out of the captured forward.",
                module_path(node),
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
def _markers(model: nn.Module, leaves: dict[str, OpaqueLeaf], augmentations: Mapping[str, Forward]) -> Iterator[None]:
    """Recognised modules and opaque leaves call their marker while this is open."""
    patched = []
    try:
        for name, module in model.named_modules():
            forward = augmentations.get(name) or stand_in(module)
            if forward is not None and "forward" not in vars(module):
                module.__dict__["forward"] = forward
                patched.append(module)
        for leaf in leaves.values():
            leaf.module.__dict__["_call_impl"] = leaf.marked  # hooks too belong to what runs as itself
        with functions_stand_in(), EvenChunks():
            yield
    finally:
        for module in patched:
            del module.__dict__["forward"]
        for leaf in leaves.values():
            del leaf.module.__dict__["_call_impl"]


def _try_out(model: nn.Module, flat: list[Any], spec: pytree.TreeSpec, batch_axes: list[int | None]) -> None:
    """Run once: the model must run on the example, and torch's pytree must know the dataclasses that it returns."""
    model.eval()
    # Two examples tell as much as a large batch, which could take longer than all the rest.
    two = [v if axis is None else v.narrow(axis, 0, 2) for v, axis in zip(flat, batch_axes, strict=True)]
    try:
        try:
            output = _outputs(model, two, spec)
        except Exception:  # a batch size that is fixed in the model is told when it is captured
            output = _outputs(model, flat, spec)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} does not run on the example inputs{_at(error, model)}: "
            f"{_first_lines(error, 3)}\nRemedy: pass example_inputs of the shape, dtype and device that it expects."
        ) from error
    register_dataclasses(output)
    require_output(model, output)


def _outputs(model: nn.Module, flat: list[Any], spec: pytree.TreeSpec) -> Any:
    args, kwargs = pytree.tree_unflatten(flat, spec)
    with torch.no_grad(), buffers_as_found(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user hears them when the model runs in earnest
        return model(*args, **kwargs)


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
