"""The compiler's way of the data, in one place: capture -> analyse -> plan -> rewrite."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from stn_fx.augment.image_format import ImageFormat
from stn_fx.compiler.capture import CapturedGraph, CapturedModel, capture, register_dataclasses
from stn_fx.compiler.insertion import insert_sites
from stn_fx.compiler.layouts import analyse_layouts, symbolic_axes
from stn_fx.compiler.plan import Plan
from stn_fx.compiler.planner import AnalysedGraph, plan_parameters, plan_sites
from stn_fx.compiler.rewrite import rewrite
from stn_fx.compiler.sites import choose_insertions, find_sites
from stn_fx.compiler.uses import ParameterFlow, find_uses
from stn_fx.errors import BatchLayoutError, CaptureError, InputError
from stn_fx.hparams import Selection
from stn_fx.rules import Registry
from stn_fx.rules.structure import LowRank

BatchAxis = int | Sequence[int | None] | Mapping[str, int | None] | None


@dataclass
class CompiledModel:
    """The graphs of the three passes, and everything that was found on the way."""

    plan: Plan
    captured: CapturedModel
    analysed: dict[str, AnalysedGraph]
    base: GraphModule
    linearized_training: GraphModule
    linearized_evaluation: GraphModule
    response: GraphModule
    registry: Registry
    predicted_cost: Any = None
    """Filled in by the report, which is the one to ask for it."""


def compile_model(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    selections: list[Selection],
    response: LowRank | None,
    batch_axis: BatchAxis,
    registry: Registry,
    image_format: ImageFormat | None = None,
) -> CompiledModel:
    """Compile ``model`` for these example inputs.

    Raises:
        CaptureError: the forward cannot be captured.
        BatchLayoutError: no input axis can be the batch, or a chosen site's batch layout is undecided.
        UnknownHyperparameterError: a selection matches nothing in this model.
        InputError: there is nothing to train, or a colour operation without a format that fits its images.
    """
    if not any(True for _ in model.parameters()):
        raise InputError(f"{type(model).__name__} has no parameters, so there is nothing to train or to condition.")
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            f"Every parameter of {type(model).__name__} is frozen (requires_grad=False). Unfreeze those to be trained."
        )
    captured, note = capture_with_batch_axis(model, args, kwargs, batch_axis)
    state = state_tensors(model, captured)
    names = canonical_names(model)
    found = find_sites(captured.training, model, registry)
    insertions = choose_insertions(captured.training, model, selections, found, image_format)
    insert_sites(captured.training, insertions)
    for graph in (captured.training, captured.evaluation):
        _infer_missing_values(graph)
    analysed = {
        "training": _analyse(captured.training, captured, state, names, registry),
        "evaluation": _analyse(captured.evaluation, captured, state, names, registry),
    }
    parameters, effective = plan_parameters(model, analysed.values(), registry, response)
    found, layouts = find_sites(captured.training, model, registry), analysed["training"].layouts
    weights = {name: p.ndim for name, p in model.named_parameters() if p.requires_grad}
    sites, hyperparameters = plan_sites(found, selections, layouts, _image_size(captured), weights)
    plan = Plan(
        tuple(parameters), tuple(sites), tuple(hyperparameters), effective, (*captured.notes, *([note] if note else []))
    )
    return CompiledModel(
        plan,
        captured,
        analysed,
        rewrite(analysed["training"], plan, registry, "base"),
        rewrite(analysed["training"], plan, registry, "linearized"),
        rewrite(analysed["evaluation"], plan, registry, "linearized"),
        rewrite(analysed["evaluation"], plan, registry, "response"),
        registry,
    )


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter -> its first name, so that a tied weight is one parameter."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def state_tensors(model: nn.Module, captured: CapturedModel) -> dict[str, Tensor]:
    """Live parameters, buffers and captured constants by qualified name."""
    return {
        **captured.constants,
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }


def _analyse(
    graph: CapturedGraph, captured: CapturedModel, state: dict[str, Tensor], names: dict[str, str], registry: Registry
) -> AnalysedGraph:
    layouts = analyse_layouts(graph, captured, state)
    flow = ParameterFlow(graph, names)
    return AnalysedGraph(graph, layouts, flow, find_uses(graph, flow, layouts, registry))


def _infer_missing_values(graph: CapturedGraph) -> None:
    """Nodes that functionalization added have no captured value yet: derive it from their arguments."""
    for node in graph.graph.nodes:
        if node.op != "call_function" or "val" in node.meta:
            continue
        arguments = torch.fx.node.map_arg(node.args, lambda n: n.meta["val"])
        options = torch.fx.node.map_arg(dict(node.kwargs), lambda n: n.meta["val"])
        node.meta["val"] = node.target(*arguments, **options)


def capture_with_batch_axis(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch_axis: BatchAxis
) -> tuple[CapturedModel, str]:
    """Capture with the batch axis that the caller names, else with the first of 0 and 1 that the probe confirms.

    The second value is a note for the report, empty where there is nothing to say.
    """
    register_dataclasses((args, kwargs))
    flat = pytree.tree_leaves((args, kwargs))
    if not any(isinstance(value, Tensor) and value.ndim for value in flat):
        raise InputError("The example inputs hold no tensor with a batch axis. Pass a batch as the model takes it.")
    if batch_axis is not None:
        captured = capture(model, args, kwargs, _named_axes(flat, batch_axis))
        if not _outputs_are_decided(model, captured):
            raise BatchLayoutError(
                f"With batch_axis={batch_axis!r} the examples of {type(model).__name__} are not independent: changing "
                f"one example changes the outputs of others, or the outputs have no batch axis. Name another axis."
            )
        return captured, ""
    failure: Exception | None = None
    captured = None
    for axis in (0, 1):
        axes = _common_axes(flat, axis)
        if axes is None:
            continue
        try:
            captured = capture(model, args, kwargs, axes)
        except CaptureError as error:
            failure = failure or error
            continue
        if _outputs_are_decided(model, captured):
            return captured, "" if axis == 0 else "batch axis 1 of the inputs was found by the dependency probe"
    if failure is not None and captured is None:
        raise failure
    raise BatchLayoutError(
        f"No axis of the inputs of {type(model).__name__} can be the batch: along axis 0 and 1 the examples are not "
        f"independent in the outputs. Name it with batch_axis= (an int, or one per input)."
    )


def _named_axes(flat: list[Any], batch_axis: Any) -> list[int | None]:
    if isinstance(batch_axis, int):
        return [batch_axis if isinstance(v, Tensor) and v.ndim > batch_axis else None for v in flat]
    given = list(batch_axis.values()) if isinstance(batch_axis, Mapping) else list(batch_axis)
    if len(given) != len(flat):
        raise InputError(
            f"batch_axis has {len(given)} entries, but there are {len(flat)} inputs: one for each, or one int."
        )
    return given


def _common_axes(flat: list[Any], axis: int) -> list[int | None] | None:
    """The axis for every tensor whose size there agrees with the first one's; None where there is no such tensor."""
    sizes = [v.shape[axis] for v in flat if isinstance(v, Tensor) and v.ndim > axis]
    if not sizes:
        return None
    return [axis if isinstance(v, Tensor) and v.ndim > axis and v.shape[axis] == sizes[0] else None for v in flat]


def _outputs_are_decided(model: nn.Module, captured: CapturedModel) -> bool:
    graph = captured.evaluation
    layouts = analyse_layouts(graph, captured, state_tensors(model, captured))
    output = next(node for node in graph.graph.nodes if node.op == "output")
    batched = [
        node
        for node in output.all_input_nodes
        if isinstance(node.meta.get("val"), Tensor) and symbolic_axes(node.meta["val"], graph.batch_symbol)
    ]
    decided = [node for node in batched if node in layouts]
    return bool(decided) and layouts_include(decided, batched)


def layouts_include(decided: list[Node], batched: list[Node]) -> bool:
    """Whether at least one output has a decided layout and the first one does."""
    return batched[0] in decided


def _image_size(captured: CapturedModel) -> tuple[int, int] | None:
    for value in captured.example:
        if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point():
            return int(value.shape[-2]), int(value.shape[-1])
    return None
