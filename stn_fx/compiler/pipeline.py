"""The compiler's way of the data, in one place: capture -> analyse -> plan -> rewrite."""

import operator
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from stn_fx.augment.image_format import ImageFormat
from stn_fx.compiler.activation_sites import named_modules, require_time_axes
from stn_fx.compiler.augmentation_modules import left_augmentations, tuned_augmentations
from stn_fx.compiler.capture import CapturedGraph, CapturedModel, Forward, capture, register_dataclasses
from stn_fx.compiler.forward_mode import lacks_forward_mode
from stn_fx.compiler.functionalize import module_path
from stn_fx.compiler.insertion import insert_sites
from stn_fx.compiler.layouts import analyse_layouts, symbolic_axes
from stn_fx.compiler.plan import Plan
from stn_fx.compiler.planner import AnalysedGraph, plan_parameters, plan_sites, require_weights
from stn_fx.compiler.preconditions import require_batch, require_trainable
from stn_fx.compiler.rewrite import rewrite, takes_batch_statistics, trained_statistics
from stn_fx.compiler.sites import choose_insertions, find_sites
from stn_fx.compiler.uses import ParameterFlow, find_uses
from stn_fx.errors import BatchLayoutError, CaptureError, InputError, StnError
from stn_fx.hparams import Selection
from stn_fx.rules import Registry, load_builtin_rules
from stn_fx.rules.rule import Groups
from stn_fx.rules.structure import LowRank, RowWise
from stn_fx.rules.tangent import differentiable

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
    further: dict[tuple[Groups | None, bool], GraphModule] = field(default_factory=dict)
    """More variants of the linearized pass, made when first needed."""
    responses_with_statistics: dict[Groups | None, GraphModule] = field(default_factory=dict)
    """The same of the response pass."""
    predicted_cost: Any = None
    """Filled in by the report, which is the one to ask for it."""

    @property
    def examples_lead(self) -> bool:
        """Whether axis 0 of every floating output holds the examples, and nothing but them."""
        analysed = self.analysed["training"]
        nodes = [node for node in analysed.captured.output_nodes() if differentiable(node.meta.get("val"))]
        return all(tuple(analysed.layouts.get(node, ())) == (0, 1, 1) for node in nodes)

    @cached_property
    def takes_batch_statistics(self) -> bool:
        """Whether a batch norm takes the statistics of the batch in training."""
        return takes_batch_statistics(self.captured.training)

    @cached_property
    def trained_statistics(self) -> set[str]:
        """Names of running statistics that training updates."""
        return trained_statistics(self.captured.training)

    def linearized_in_groups(self, groups: Groups | None, updates_buffers: bool = False) -> GraphModule:
        """The linearized pass on the training graph, with tangents of batch statistics for each group of examples.

        Args:
            groups: which examples share a perturbation; None = tangents are means over the batch.
            updates_buffers: for the pass that trains the model; see `require_trainable_primal`.
        """
        groups = groups if self.takes_batch_statistics else None
        if groups is None and not updates_buffers:
            return self.linearized_training
        if (groups, updates_buffers) not in self.further:
            graph = rewrite(
                self.analysed["training"], self.plan, self.registry, "linearized", updates_buffers, groups=groups
            )
            self.further[groups, updates_buffers] = graph
        return self.further[groups, updates_buffers]

    def require_trainable_primal(self) -> None:
        """The primal of the linearized pass can be what trains the model; only one variant needs that.

        Raises:
            StnError: a rule computes its primal in a way that nothing can be trained by.
        """
        nodes = self.analysed["training"].captured.graph.nodes
        rules = {node: rule for node in nodes if (rule := self.registry.find(node)) is not None}
        own = set(load_builtin_rules().rules())
        known = {rule: rule.differentiable_primal for rule in rules.values()}
        lacking = [node for node, rule in rules.items() if not (rule in own if known[rule] is None else known[rule])]
        if lacking:
            places = sorted({f"{rules[node].name} at {module_path(node) or 'the model'}" for node in lacking})
            raise StnError(
                f"The linearized pass of {', '.join(places[:4])} cannot train the model: its primal passes no gradient "
                f"on, or is not known to (a rule of your own says so by differentiable_primal = True). Use DeltaSTN "
                f"instead of SharedForward."
            )

    @cached_property
    def response_training(self) -> GraphModule:
        """The response pass on the training graph, with dropout and augmentation; only some variants need it."""
        return rewrite(self.analysed["training"], self.plan, self.registry, "response", updates_buffers=True)

    def response_with_statistics(self, groups: Groups | None) -> GraphModule:
        """The response pass with derivatives that go through the running statistics that training updates.

        Args:
            groups: which examples share a perturbation; None = derivatives are those of statistics of the batch.
        """
        following = self.trained_statistics
        if not following:
            return self.response
        if groups not in self.responses_with_statistics:
            self.responses_with_statistics[groups] = rewrite(
                self.analysed["evaluation"], self.plan, self.registry, "response", following=following, groups=groups
            )
        return self.responses_with_statistics[groups]


def compile_model(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    selections: list[Selection],
    response: LowRank | RowWise,
    batch_axis: BatchAxis,
    registry: Registry,
    image_format: ImageFormat | None = None,
    responds: bool = True,
) -> CompiledModel:
    """Compile ``model`` for these example inputs; without responses where it does not have to respond.

    Raises:
        CaptureError: the forward cannot be captured.
        BatchLayoutError: no input axis can be the batch, or a chosen site's batch layout is undecided.
        UnknownHyperparameterError: a selection matches nothing in this model.
        InputError: there is nothing to train, or a colour operation without a format that fits its images.
    """
    require_trainable(model)
    watched = named_modules(model, selections)
    captured, note = capture_with_batch_axis(
        model, args, kwargs, batch_axis, watched, tuned_augmentations(model, selections)
    )
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
    parameters, effective = plan_parameters(model, analysed.values(), registry, response, captured.opaque)
    if not any(each.conditioned for each in parameters):
        reasons = "; ".join(dict.fromkeys(f"{each.name}: {each.reason}" for each in parameters[:8]))
        raise CaptureError(f"No parameter of {type(model).__name__} can respond to hyperparameters. {reasons}")
    if not responds:
        parameters, effective = [each.without_response() for each in parameters if not each.is_effective], {}
    found = find_sites(captured.training, model, registry)
    weights = {name: p.ndim for name, p in model.named_parameters() if p.requires_grad}
    sites, hyperparameters, chosen = plan_sites(found, selections, analysed["training"], _image_size(captured), weights)
    require_weights(hyperparameters, weights)
    require_time_axes(sites, {node.name: node for node in captured.training.graph.nodes})
    fallbacks = _fallback_notes(captured, analysed.values(), registry)
    notes = (*captured.notes, *([note] if note else []), *chosen, *left_augmentations(model, selections), *fallbacks)
    parameters = [each.with_terms_for(len(hyperparameters)) for each in parameters]
    plan = Plan(tuple(parameters), tuple(sites), tuple(hyperparameters), effective, notes)
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


def _fallback_notes(captured: CapturedModel, graphs: Iterable[AnalysedGraph], registry: Registry) -> Iterator[str]:
    """What did not go the usual way, for the report."""
    for leaf in captured.opaque:
        by = "" if leaf.forward_mode else ", tangents pass through it by central differences"
        yield (
            f"{leaf.name} runs as itself, since it cannot be captured ({leaf.reason}): its parameters are trained but "
            f"do not respond, its dropouts keep their rates{by}"
        )
    lacking = {
        f"{node.target} at {module_path(node) or 'the model'}"
        for graph in graphs
        for node in graph.captured.graph.nodes
        if any(n in graph.flow.carries_batch and differentiable(n.meta.get("val")) for n in node.all_input_nodes)
        and lacks_forward_mode(node, registry)
    }
    if lacking:
        yield f"no forward mode, so tangents pass by central differences: {', '.join(sorted(lacking))}"


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter -> its first name, so that a tied weight is one parameter."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def state_tensors(model: nn.Module, captured: CapturedModel) -> dict[str, Tensor]:
    """Live parameters, buffers and constants by qualified name."""
    return {
        **{name: _live_constant(model, name, tensor) for name, tensor in captured.constants.items()},
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }


def constants_fit(model: nn.Module, captured: CapturedModel) -> bool:
    """Whether plain tensor attributes still have the shapes and dtypes that they were captured with."""
    pairs = ((_live_constant(model, name, tensor), tensor) for name, tensor in captured.constants.items())
    return all(live.shape == tensor.shape and live.dtype == tensor.dtype for live, tensor in pairs)


def _live_constant(model: nn.Module, name: str, captured: Tensor) -> Tensor:
    """What is now at the attribute of a captured tensor; a literal in the code has no attribute."""
    path, _, attribute = name.rpartition(".")
    owner: Any = model
    for part in path.split(".") if path else ():
        owner = getattr(owner, part, None)
    live = getattr(owner, attribute, None)
    return live if isinstance(live, Tensor) else captured


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
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch_axis: BatchAxis,
    watched: Collection[str] = (),
    augmentations: Mapping[str, Forward] | None = None,
) -> tuple[CapturedModel, str]:
    """Capture with the batch axis that the caller names, else with the first of 0 and 1 that the probe confirms.

    ``watched`` and ``augmentations`` are as for `capture`. The second value is a note for the report,
    empty where there is nothing to say.
    """
    register_dataclasses((args, kwargs))
    require_batch(args, kwargs)
    flat = pytree.tree_leaves((args, kwargs))
    if batch_axis is not None:
        captured = capture(model, args, kwargs, _named_axes(flat, batch_axis), watched, augmentations)
        decided, meeting = _outputs_are_decided(model, captured)
        if not decided:
            raise BatchLayoutError(
                f"With batch_axis={batch_axis!r} the examples of {type(model).__name__} are not independent: changing "
                f"one example changes the outputs of others{meeting}, or the outputs have no batch axis. Name another "
                f"axis."
            )
        return captured, ""
    failure: Exception | None = None
    captured, meetings = None, []
    for axes in _candidate_axes(flat):
        try:
            captured = capture(model, args, kwargs, axes, watched, augmentations)
        except CaptureError as error:
            failure = failure or error
            continue
        decided, meeting = _outputs_are_decided(model, captured)
        if decided:
            return captured, _note_on(axes)
        meetings.append(meeting)
    if failure is not None and captured is None:
        raise failure
    raise BatchLayoutError(
        f"No axis of the inputs of {type(model).__name__} can be the batch: along axis 0 and 1 the examples are not "
        f"independent in the outputs{next(iter(meetings), '')}, or the outputs have no axis for them. Return one row "
        f"per example, or name the axis with batch_axis= (an int, or one per input). Outputs that compare examples "
        f"with each other, as a contrastive loss needs them, have none: leave them out of the forward."
    )


def _named_axes(flat: list[Any], batch_axis: Any) -> list[int | None]:
    if isinstance(batch_axis, (bool, str)) or not isinstance(batch_axis, (int, Mapping, Sequence)):
        raise InputError(f"batch_axis={batch_axis!r} is neither an int nor one int per input.")
    if isinstance(batch_axis, int):
        ranks = [v.ndim for v in flat if isinstance(v, Tensor)]
        if not 0 <= batch_axis < max(ranks, default=0):
            raise InputError(f"batch_axis={batch_axis} is out of range: the inputs have {ranks} axes.")
        return [batch_axis if isinstance(v, Tensor) and v.ndim > batch_axis else None for v in flat]
    given = list(batch_axis.values()) if isinstance(batch_axis, Mapping) else list(batch_axis)
    if len(given) != len(flat):
        raise InputError(
            f"batch_axis has {len(given)} entries, but there are {len(flat)} inputs: one for each, or one int."
        )
    return given


def _candidate_axes(flat: list[Any]) -> Iterator[list[int | None]]:
    """Batch axes to try: one for all inputs, then inputs that differ, as the states (L, B, H) of recurrent networks."""
    tried: list[list[int | None]] = []
    for choose in (_common_axes, _differing_axes):
        for axis in (0, 1):
            axes = choose(flat, axis)
            if axes is not None and axes not in tried:
                tried.append(axes)
                yield axes


def _differing_axes(flat: list[Any], axis: int) -> list[int | None] | None:
    """``axis`` for the first tensor; for the others the last of their axes 0 and 1 that has its size there."""
    first = next((v for v in flat if isinstance(v, Tensor) and v.ndim), None)
    if first is None or first.ndim <= axis:
        return None
    size = first.shape[axis]
    fitting = [[a for a in (0, 1) if isinstance(v, Tensor) and v.ndim > a and v.shape[a] == size] for v in flat]
    return [axis if v is first else (axes[-1] if axes else None) for v, axes in zip(flat, fitting, strict=True)]


def _note_on(axes: list[int | None]) -> str:
    if not any(axes):
        return ""
    if len({axis for axis in axes if axis is not None}) == 1:
        return "batch axis 1 of the inputs was found by the dependency probe"
    return f"batch axes {axes} of the inputs were found by the dependency probe"


def _common_axes(flat: list[Any], axis: int) -> list[int | None] | None:
    """The axis for every tensor whose size there agrees with the first one's; None where there is no such tensor."""
    sizes = [v.shape[axis] for v in flat if isinstance(v, Tensor) and v.ndim > axis]
    if not sizes:
        return None
    return [axis if isinstance(v, Tensor) and v.ndim > axis and v.shape[axis] == sizes[0] else None for v in flat]


def _outputs_are_decided(model: nn.Module, captured: CapturedModel) -> tuple[bool, str]:
    """Whether the examples are independent in the first output; if not, where they meet, as far as can be seen."""
    graph = captured.evaluation
    _infer_missing_values(graph)
    layouts = analyse_layouts(graph, captured, state_tensors(model, captured))
    output = next(node for node in graph.graph.nodes if node.op == "output")
    batched = [
        node
        for node in output.all_input_nodes
        if isinstance(node.meta.get("val"), Tensor) and symbolic_axes(node.meta["val"], graph.batch_symbol)
    ]
    if batched and batched[0] in layouts:
        return True, ""
    meeting = next((node for node in graph.graph.nodes if _loses_the_batch(node, layouts)), None)
    if meeting is None:
        return False, ""
    return False, f" (they meet in {meeting.target} at {module_path(meeting) or 'the model itself'})"


def _loses_the_batch(node: Node, layouts: Container[Node]) -> bool:
    """Whether all batched values that this operator takes are decided, and what it makes of them is not."""
    sources = node.args[0].all_input_nodes if node.target is operator.getitem else node.all_input_nodes
    made = differentiable(node.meta.get("val")) and node.op == "call_function" and node not in layouts
    return made and any(n in layouts and differentiable(n.meta["val"]) for n in sources)


def _image_size(captured: CapturedModel) -> tuple[int, int] | None:
    for value in captured.example:
        if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point():
            return int(value.shape[-2]), int(value.shape[-1])
    return None
