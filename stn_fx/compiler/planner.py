"""From captured graphs and the user's selections to the plan."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from stn_fx.compiler.capture import CapturedGraph
from stn_fx.compiler.plan import ParameterPlan, SitePlan
from stn_fx.compiler.precedence import acting_selections, precedence_notes
from stn_fx.compiler.sites import FoundSite
from stn_fx.compiler.uses import EXACT_LIMIT, GraphUses, ParameterFlow, WeightUse, effective_name, row_axes
from stn_fx.errors import BatchLayoutError, UnknownHyperparameterError
from stn_fx.hparams import ResolvedHyperparameter, Selection, SiteContext, resolve
from stn_fx.hparams.weight_groups import weight_groups
from stn_fx.rules import Registry
from stn_fx.rules.layout import BatchLayout
from stn_fx.rules.opaque import OpaqueLeaf
from stn_fx.rules.structure import LowRank, RowWise


@dataclass
class AnalysedGraph:
    """One captured graph with what the analysis found in it."""

    captured: CapturedGraph
    layouts: dict[Node, BatchLayout]
    flow: ParameterFlow
    uses: GraphUses


def plan_parameters(
    model: nn.Module,
    graphs: Iterable[AnalysedGraph],
    registry: Registry,
    response: LowRank | RowWise,
    opaque: Iterable[OpaqueLeaf] = (),
) -> tuple[list[ParameterPlan], dict[str, dict[str, str]]]:
    """Plan of every parameter and effective weight, and where the effective weights stand in each graph."""
    graphs = list(graphs)
    inside = {id(p): leaf.name for leaf in opaque for p in leaf.module.parameters()}
    plans = [
        _plan_parameter(name, p, graphs, registry, response, inside.get(id(p))) for name, p in model.named_parameters()
    ]
    effective, where = _plan_effective(graphs, registry, response, {plan.name for plan in plans})
    through = _through(graphs, where)
    plans = [_covered(plan, through.get(plan.name, ())) for plan in plans]
    return plans + effective, where


def _plan_parameter(
    name: str,
    parameter: Tensor,
    graphs: list[AnalysedGraph],
    registry: Registry,
    response: LowRank | RowWise,
    opaque: str | None,
) -> ParameterPlan:
    shape = tuple(parameter.shape)
    weights = [use for graph in graphs for use in graph.uses.weights.get(name, [])]
    general = [use for graph in graphs for use in graph.uses.general.get(name, [])]
    calls = len(graphs[-1].uses.weights.get(name, [])) + len(graphs[-1].uses.general.get(name, []))
    if not parameter.requires_grad:
        return ParameterPlan(name, shape, "frozen", uses=calls, reason="requires_grad is False, so it does not respond")
    if not parameter.is_floating_point():
        return ParameterPlan(name, shape, "none", uses=calls, reason=f"its dtype is {parameter.dtype}")
    if opaque is not None:
        return ParameterPlan(name, shape, "none", uses=calls, reason=f"{opaque} cannot be captured and runs as itself")
    if any(name in graph.uses.without_gradient for graph in graphs if graph.captured.training):
        reason = "it reaches the output behind a detach or an integer only, so no gradient could teach its response"
        return ParameterPlan(name, shape, "none", uses=calls, reason=reason)
    reasons = [reason for _, reason in general if reason]
    if reasons:
        return ParameterPlan(name, shape, "none", uses=calls, reason=reasons[0])
    if weights and not general:
        plan = _structured(name, shape, weights, registry, response)
        if plan is not None:
            return plan
    if not weights and not general:
        used = any(name in graph.uses.through for graph in graphs)
        reason = "the weight made from it has no counterpart in both modes" if used else "the forward does not use it"
        return ParameterPlan(name, shape, "none", reason=reason)
    consumer = general[0][0] if general else weights[0].consumer
    rule = registry.find(consumer)
    if parameter.numel() > EXACT_LIMIT:
        reason = (
            f"no rule conditions its use by {consumer.target}, and {parameter.numel():,} scalars are too many for the "
            f"exact Jacobian"
        )
        return ParameterPlan(name, shape, "none", uses=calls, reason=reason)
    return ParameterPlan(name, shape, "exact", rule=rule.name if rule else "any operator, per example", uses=calls)


def _structured(
    name: str, shape: tuple[int, ...], uses: list[WeightUse], registry: Registry, response: LowRank | RowWise
) -> ParameterPlan | None:
    """Row-wise or low-rank plan over an axis that every use allows; None where there is no such axis."""
    rule = registry.find(uses[0].consumer)
    assert rule is not None
    rules = ", ".join(sorted({registry.find(use.consumer).name for use in uses}))  # type: ignore[union-attr]
    calls = len({id(use.consumer.graph) for use in uses}) or 1
    for low_rank in (True, False) if isinstance(response, LowRank) else (False,):
        candidates = [row_axes(use, registry, len(shape), low_rank) for use in uses]
        common = [axis for axis in candidates[0] if all(axis in other for other in candidates)]
        common.sort(key=lambda axis: sum(other.index(axis) for other in candidates))
        if not common:
            continue
        if not low_rank:
            if not any(use.table for use in uses):  # rows of the longer side: more of them have more directions
                common.sort(key=lambda axis: -shape[axis])
            terms, reason = _terms(uses, registry, response)
            if any(use.table for use in uses):
                reason = "a table, too large for the exact Jacobian"
            plan = ParameterPlan(name, shape, "row-wise", rules, common[0], uses=len(uses) // calls, reason=reason)
            return replace(plan, terms=terms, padding_row=_padding_row(uses, registry))
        assert isinstance(response, LowRank)
        if _low_rank_is_smaller(shape, common[0], uses, response.rank):
            plan = ParameterPlan(name, shape, "low-rank", rules, common[0], response.rank, uses=len(uses) // calls)
            return replace(plan, padding_row=_padding_row(uses, registry))
    return None


def _terms(uses: list[WeightUse], registry: Registry, response: LowRank | RowWise) -> tuple[int, str]:
    """Terms of a row-wise response, and what is particular about it."""
    if isinstance(response, LowRank):
        return 1, "low rank would not be smaller than this layer"
    lacking = [rule.name for use in uses if (rule := registry.find(use.consumer)) is not None and rule.single_term]
    if response.terms > 1 and lacking:
        return 1, f"one term, as the {lacking[0]} takes no more"
    return response.terms, ""


def _padding_row(uses: list[WeightUse], registry: Registry) -> int | None:
    """The padding entry on which all uses agree; a weight tied to a decoder learns about it there."""
    rows = {rule.padding_row(use.consumer) for use in uses if (rule := registry.find(use.consumer)) is not None}
    return rows.pop() if len(rows) == 1 else None


def _low_rank_is_smaller(shape: tuple[int, ...], axis: int, uses: list[WeightUse], rank: int) -> bool:
    groups = max(_groups(use.consumer) for use in uses)
    transposed = any("transpose" in str(use.consumer.target) and groups > 1 for use in uses)
    rest = 1
    for other, size in enumerate(shape):
        rest *= size if other != axis else 1
    return not transposed and rank * groups < shape[axis] and rank < rest


def _groups(node: Node) -> int:
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else []
    if "groups" not in names:
        return 1
    position = names.index("groups")
    return int(node.args[position] if position < len(node.args) else node.kwargs.get("groups", 1))  # type: ignore[arg-type]


def _plan_effective(
    graphs: list[AnalysedGraph], registry: Registry, response: LowRank | RowWise, parameters: set[str]
) -> tuple[list[ParameterPlan], dict[str, dict[str, str]]]:
    plans: dict[str, ParameterPlan] = {}
    where: dict[str, dict[str, str]] = {}
    for graph in graphs:
        kind = "training" if graph.captured.training else "evaluation"
        where[kind] = {}
        taken: set[str] = set()
        for node, uses in graph.uses.effective.items():
            # In the order of the graph, which is the same in both modes; never the name of an unrelated parameter.
            foreign = parameters - graph.flow.sources[node]
            name = _unused_name(effective_name(uses[0], graph.flow), taken | foreign)
            taken.add(name)
            shape = tuple(int(size) for size in node.meta["val"].shape)
            plan = _structured(name, shape, uses, registry, response)
            if plan is not None and plans.get(name, plan).shape == shape:
                plans[name] = replace(plan, is_effective=True)
                where[kind][node.name] = name
    both = set(where["training"].values()) & set(where["evaluation"].values())
    where = {kind: {node: name for node, name in found.items() if name in both} for kind, found in where.items()}
    return [plan for name, plan in plans.items() if name in both], where


def _unused_name(name: str, taken: set[str]) -> str:
    """The name, or the first of name_2, name_3, ... that is free."""
    return name if name not in taken else next(n for i in count(2) if (n := f"{name}_{i}") not in taken)


def _through(graphs: list[AnalysedGraph], where: dict[str, dict[str, str]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, set[str]] = {}
    for graph in graphs:
        names = where["training" if graph.captured.training else "evaluation"]
        for parameter, nodes in graph.uses.through.items():
            found.setdefault(parameter, set()).update(names[node.name] for node in nodes if node.name in names)
    return {name: tuple(sorted(values)) for name, values in found.items() if values}


def _covered(plan: ParameterPlan, through: tuple[str, ...]) -> ParameterPlan:
    if not through or plan.structure != "none" or plan.uses:
        return plan
    return ParameterPlan(
        plan.name, plan.shape, "effective", through=through, reason=f"responds through {', '.join(through)}"
    )


def plan_sites(
    found: list[FoundSite],
    selections: list[Selection],
    graph: AnalysedGraph,
    image_size: Any,
    weights: Collection[str] = (),
) -> tuple[list[SitePlan], list[ResolvedHyperparameter], list[str]]:
    """Which hyperparameter acts at which site of the training graph, and notes for the report.

    A value that depends on parameters only is the same for every example, and so are its dropouts. ``weights`` are the
    names of the trained parameters, for terms of the loss with a pattern.

    Raises:
        InputError: several selections choose one site, and none is more specific.
        UnknownHyperparameterError: a selection that matches nothing, all of them together.
        BatchLayoutError: a selected site whose batch layout is undecided.
    """
    layouts, shared = graph.layouts, {site.node for site in found if site.node not in graph.flow.carries_batch}
    hyperparameters: dict[str, ResolvedHyperparameter] = {}
    acting: dict[str, tuple[tuple[str, str], ...]] = {}
    options: dict[str, dict[str, bool | int]] = {}
    undecided: list[str] = []
    missed: list[str] = []
    winners = acting_selections(found, selections)
    for selection in selections:
        sites = [site for site, winner in winners.items() if winner is selection and site.node not in shared]
        without_site = selection.entry.kind in ("loss", "mixing")
        if not sites and not without_site:
            if selection.required:
                missed.append(_missed(selection, found, graph.captured, weights))
            continue
        if without_site:
            if selection.pattern is not None and not any(selection.matches(name) for name in weights):
                missed.append(
                    f"{selection.text!r} matches no trained parameter. Their names begin with: "
                    f"{', '.join(sorted({name.split('.')[0] for name in weights}))}."
                )
                continue
            for each in resolve(selection, SiteContext(image_size=image_size)):
                hyperparameters[each.name] = each
            continue
        active = max((site.own_rate for site in sites), default=0.0)
        for site in sites:
            if site.node not in layouts:
                undecided.append(f"{selection.entry.name} at {site.name}")
                continue
            own = active if selection.shared else site.own_rate
            resolved = resolve(selection, SiteContext(own or None, image_size, _own_values(selection, site)), site.name)
            for each in resolved:
                hyperparameters.setdefault(each.name, each)
            acting[_key(site)] = tuple((each.component, each.name) for each in resolved)
            options[_key(site)] = selection.options
    if missed:
        raise UnknownHyperparameterError("\n".join(missed))
    if undecided:
        raise BatchLayoutError(
            f"The place of the batch is undecided at: {', '.join(undecided)}. Remedy: name the inputs' batch axis with "
            f"batch_axis=, or choose other sites with a pattern, such as 'dropout@encoder'."
        )
    plans = [
        SitePlan(
            site.name, site.entry, site.node.name, site.own_rate, site.inserted, layouts.get(site.node),
            acting.get(_key(site), ()),
            "" if _key(site) in acting else _SHARED if site.node in shared else _UNASKED, options.get(_key(site), {}),
        )
        for site in found
    ]  # fmt: skip
    return plans, list(hyperparameters.values()), list(precedence_notes(winners, selections))


def require_weights(hyperparameters: Iterable[ResolvedHyperparameter], weights: Mapping[str, int]) -> None:
    """Every coefficient of the loss with a pattern, and those beside one, has weights (name: number of axes) to act on.

    Raises:
        UnknownHyperparameterError: all its weights belong to patterns before it.
    """
    for entry in ("weight_decay", "l1"):
        names = [each.name for each in hyperparameters if each.entry == entry]
        if names in ([], [entry]):
            continue
        groups = weight_groups(names, weights)
        empty = [name for name in names if not groups[name]]
        if empty:
            raise UnknownHyperparameterError(
                f"{', '.join(empty)}: no weights are left to act on, each belongs to the first pattern that matches "
                f"it. Leave it out, or name the narrower pattern first."
            )


def _own_values(selection: Selection, site: FoundSite) -> dict[str, float]:
    """The author's value by component of the entry, where each has one."""
    components = [] if selection.shared else [component.name for component in selection.entry.components]
    return dict(zip(components, site.own_values, strict=False))


_UNASKED = "no hyperparameter was asked for here"
_SHARED = "it depends on parameters only, so its value has no batch axis; it drops for all examples alike"


def _key(site: FoundSite) -> str:
    return f"{site.entry}:{site.node.name}"


def _missed(selection: Selection, found: list[FoundSite], captured: CapturedGraph, weights: Collection[str]) -> str:
    places = ", ".join(dict.fromkeys(name.partition(".")[0] for name in weights))
    names = sorted({f"{site.entry}@{site.name}" for site in found})
    have = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return (
        f"{selection.text!r} matches nothing in this model. "
        + (f"It has these sites: {have}. " if names else "It has no sites of its own. ")
        + f"Patterns name modules, where sites are put (here they begin with {places}), or inputs "
        f"({', '.join(captured.inputs)}). "
        + "Terms of the loss (weight_decay, label_smoothing) fit any model, and augmentations (rotation, cutout) image "
        "inputs; `stn-fx hparams` lists them."
    )
