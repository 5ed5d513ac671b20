"""How a model uses its parameters: every path from a parameter to the activations, read off the captured graphs.

A *weight use* is a weight argument of an operator whose rule can scale its rows, reached through operators that a
structured response can pass.  If the way there is not linear, the operator uses an *effective* weight instead.
Everything else is a *general* use.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from stn_fx.compiler.capture import CapturedGraph
from stn_fx.compiler.compose import GATHERS, linear_operand, map_row_axis
from stn_fx.compiler.forward_mode import lacks_forward_mode
from stn_fx.compiler.functionalize import module_path
from stn_fx.compiler.layouts import symbolic_axes
from stn_fx.rules import Registry, Rule
from stn_fx.rules.layout import BatchLayout
from stn_fx.rules.tangent import differentiable

aten = torch.ops.aten

EXACT_LIMIT = 2**16
"""Parameters without a rule for their use get the exact Jacobian up to this many scalars; beyond it costs too much."""


@dataclass
class WeightUse:
    """One use as a weight: the consuming operator, the argument, and the way from the parameter."""

    consumer: Node
    position: int
    weight: Node
    chain: list[tuple[Node, int]] = field(default_factory=list)
    """Operators from the parameter to ``weight``, in order, each with the argument that it is linear in."""
    table: bool = False
    """Whether it is no layer's weight, but so large that it responds as one."""


@dataclass
class GraphUses:
    """Uses of all parameters in one graph."""

    weights: dict[str, list[WeightUse]] = field(default_factory=dict)
    effective: dict[Node, list[WeightUse]] = field(default_factory=dict)
    through: dict[str, set[Node]] = field(default_factory=dict)
    """Parameter -> the effective weights that depend on it."""
    general: dict[str, list[tuple[Node, str]]] = field(default_factory=dict)
    """Parameter -> (node, reason why it cannot be conditioned there, or "")."""
    without_gradient: set[str] = field(default_factory=set)
    """Parameters that reach the output behind a ``detach`` or an integer only."""


class ParameterFlow:
    """Which values of a graph depend on parameters only, and on which."""

    def __init__(self, captured: CapturedGraph, parameters: dict[str, str]) -> None:
        self.captured = captured
        self.carries_batch: set[Node] = set()
        self.sources: dict[Node, set[str]] = {}
        inputs = set(captured.inputs)
        for node in captured.graph.nodes:
            if node.op == "placeholder":
                if node.name in inputs:
                    self.carries_batch.add(node)
                elif captured.state[node.name] in parameters:
                    self.sources[node] = {parameters[captured.state[node.name]]}
            elif node.op == "call_function":
                self._visit(node)

    def _visit(self, node: Node) -> None:
        value = node.meta.get("val")
        shaped = isinstance(value, Tensor) and symbolic_axes(value, self.captured.batch_symbol)
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, tuple, list))]
        if shaped or any(n in self.carries_batch for n in tensors):
            self.carries_batch.add(node)
            return
        if node.target is aten.detach.default or (isinstance(value, Tensor) and not differentiable(value)):
            return
        sources = set().union(*(self.sources.get(n, set()) for n in tensors))
        if sources:
            self.sources[node] = sources

    def parameter_only(self, argument: object) -> bool:
        """Whether this value depends on parameters and on no input."""
        return isinstance(argument, Node) and argument in self.sources

    def is_fixed(self, argument: object) -> bool:
        """Whether this value depends neither on parameters nor on inputs."""
        return isinstance(argument, Node) and argument not in self.sources and argument not in self.carries_batch


def find_uses(
    captured: CapturedGraph, flow: ParameterFlow, layouts: dict[Node, BatchLayout], registry: Registry
) -> GraphUses:
    """All uses of all parameters in one graph."""
    uses = GraphUses()
    for consumer in captured.graph.nodes:
        if consumer.op == "output":
            for node in consumer.all_input_nodes:
                if flow.parameter_only(node):
                    _general(uses, flow, node, consumer, "it is an output of the model that has no batch axis")
            continue
        if consumer not in flow.carries_batch:
            continue
        for argument in consumer.all_input_nodes:
            if flow.parameter_only(argument):
                _classify(uses, flow, consumer, argument, layouts, registry)
    uses.without_gradient = _without_gradient(captured, flow)
    return uses


def _without_gradient(captured: CapturedGraph, flow: ParameterFlow) -> set[str]:
    reached, consumed = set(), set()
    learning: set[Node] = set()
    for node in reversed(captured.graph.nodes):
        value = node.meta.get("val")
        stops = node.target is aten.detach.default or (isinstance(value, Tensor) and not differentiable(value))
        if node.op == "output" or (node in learning and not stops):
            learning.update(node.all_input_nodes)
        if node in flow.carries_batch:
            names = set().union(*(flow.sources.get(argument, set()) for argument in node.all_input_nodes))
            consumed |= names
            reached |= names if node in learning and not stops else set()
    return consumed - reached


def _classify(
    uses: GraphUses,
    flow: ParameterFlow,
    consumer: Node,
    argument: Node,
    layouts: dict[Node, BatchLayout],
    registry: Registry,
) -> None:
    barred = _barred(consumer, argument, flow, registry)
    rule = registry.find(consumer)
    reason = _undecided(consumer, rule, flow, layouts)
    position = consumer.args.index(argument) if argument in consumer.args else -1
    rank = argument.meta["val"].ndim
    axes = rule.weight_axes(consumer, position, rank) if rule is not None and position >= 0 else ()
    if not axes or reason:
        _general(uses, flow, argument, consumer, reason or barred)
        return
    table = rule.is_table(consumer, position)  # type: ignore[union-attr]
    use = WeightUse(consumer, position, argument, table=table)
    node: Any = argument
    while node.op != "placeholder":
        operand = linear_operand(node, flow.is_fixed)
        if operand is None and table:
            _general(uses, flow, argument, consumer, barred)
            return
        if operand is None or (node.target in GATHERS and not table):  # a layer's rows are those that it was given
            uses.effective.setdefault(argument, []).append(WeightUse(consumer, position, argument))
            for name in flow.sources[argument]:
                uses.through.setdefault(name, set()).add(argument)
            return
        use.chain.insert(0, (node, operand))
        node = node.args[operand]
    (name,) = flow.sources[node]
    if table and node.meta["val"].numel() <= EXACT_LIMIT:
        _general(uses, flow, argument, consumer, barred)
        return
    uses.weights.setdefault(name, []).append(use)


def _undecided(consumer: Node, rule: Rule | None, flow: ParameterFlow, layouts: dict[Node, BatchLayout]) -> str:
    """Why a parameter that differs per example cannot enter this operator; "" if it can."""
    values = rule.placed_values(consumer) if rule is not None else None
    if values is None:
        values = [consumer, *(n for n in consumer.all_input_nodes if n in flow.carries_batch)]
    for node in values:
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            return f"{consumer.target} at {module_path(consumer) or 'the model'} has several outputs"
        if isinstance(value, Tensor) and node not in layouts and (node is consumer or value.ndim > 0):
            return f"the place of the batch in {node.name} at {module_path(consumer) or 'the model'} is undecided"
    return ""


def _barred(consumer: Node, argument: Node, flow: ParameterFlow, registry: Registry) -> str:
    """Why a parameter cannot differ per example on its way to ``argument`` and into ``consumer``; "" if it can."""
    frontier, seen = [argument], {argument}
    for node in frontier:
        above = [n for n in node.all_input_nodes if flow.parameter_only(n) and n not in seen]
        frontier += above
        seen.update(above)
    for node in (consumer, *frontier):
        if lacks_forward_mode(node, registry):
            return f"{node.target} at {module_path(node) or 'the model'} has neither a rule nor a forward mode"
    return ""


def _general(uses: GraphUses, flow: ParameterFlow, argument: Node, consumer: Node, reason: str) -> None:
    for name in flow.sources[argument]:
        uses.general.setdefault(name, []).append((consumer, reason))


def row_axes(use: WeightUse, registry: Registry, ndim: int, low_rank: bool) -> list[int]:
    """Axes of the parameter that this use allows as its row axis, preferred first."""
    rule = registry.find(use.consumer)
    assert rule is not None
    if use.table and low_rank:
        return []
    allowed = rule.weight_axes(use.consumer, use.position, use.weight.meta["val"].ndim)
    ranked = []
    for axis in range(ndim):
        mapped: int | None = axis
        for node, operand in use.chain:
            mapped = map_row_axis(node, operand, mapped, low_rank)
            if mapped is None:
                break
        if mapped in allowed:
            ranked.append((allowed.index(mapped), axis))
    return [axis for _, axis in sorted(ranked)]


def effective_name(use: WeightUse, flow: ParameterFlow) -> str:
    """Qualified name of an effective weight: the module that uses it, and the attribute that it stands for."""
    path = module_path(use.consumer)
    attribute = use.consumer.meta.get("weight_names", {}).get(use.position, "weight")
    return f"{path}.{attribute}" if path else attribute
