"""Rewrite: a captured graph and the plan -> the graph of one pass.  It decides nothing; the plan has decided.

Every pass has one signature, ``forward(state, response, values, delta, draws, *inputs)``: tensors by qualified name,
response parameters by name, constrained hyperparameters (B, H), displacements (B, H), the source of random numbers,
and the flattened inputs.
"""

import importlib
import inspect
import math
import operator
import re
from collections.abc import Callable, Collection
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from stn_fx.compiler.capture import CapturedGraph
from stn_fx.compiler.compose import compose, linear_operand, map_row_axis
from stn_fx.compiler.forward_mode import lacks_forward_mode
from stn_fx.compiler.functionalize import module_path, takes_own_statistics, writes_statistics
from stn_fx.compiler.layouts import unit_size
from stn_fx.compiler.plan import ParameterPlan, Plan, SitePlan
from stn_fx.compiler.planner import AnalysedGraph
from stn_fx.errors import InputError
from stn_fx.rules import Registry, Rule
from stn_fx.rules.activation_terms import activation_tap
from stn_fx.rules.normalization import standardize
from stn_fx.rules.per_example import per_example, per_example_tangent
from stn_fx.rules.rule import Groups, Layout, StructuredChange
from stn_fx.rules.structure import exact_change, row_scales
from stn_fx.rules.tangent import differentiable, linearize

aten = torch.ops.aten
_CONSTANT = {
    aten.rand_like.default, aten.randn_like.default, aten.zeros_like.default, aten.ones_like.default,
    aten.empty_like.default, aten.full_like.default, aten.new_zeros.default, aten.new_ones.default,
    aten.new_full.default, aten.new_empty.default, aten.bernoulli.default, aten.bernoulli.p,
}  # fmt: skip
"""Their values do not change with those of their inputs; asked for a derivative, the random ones would draw again."""
_PARTS = {"row-wise": ("U", "V"), "low-rank": ("A", "B", "V")}
SIGNATURE = ("state", "response", "values", "delta", "draws")


def rewrite(
    analysed: AnalysedGraph,
    plan: Plan,
    registry: Registry,
    kind: str,
    updates_buffers: bool = False,
    following: Collection[str] = (),
    groups: Groups | None = None,
) -> GraphModule:
    """Graph of the "base", "linearized" or "response" pass, linted and recompiled.

    Args:
        analysed: the captured graph.
        plan: of the model.
        registry: of the rules.
        kind: of the pass.
        updates_buffers: whether it updates the buffers that it is given; the base pass always does.
        following: names of running statistics that derivatives of the response pass go through.
        groups: which examples share a perturbation in the linearized pass, where norms are to be told.
    """
    emitter = GraphEmitter(analysed, plan, registry, kind, updates_buffers or kind == "base", following, groups)
    graph = emitter.run()
    graph.eliminate_dead_code(is_impure_node=_is_impure)
    graph.lint()
    module = GraphModule(torch.nn.Module(), graph)
    module.recompile()
    return module


def _is_impure(node: Node) -> bool:
    if node.target is standardize and any(isinstance(option, Node) for option in node.args[2]):
        return True  # the running statistics
    return node.op in ("placeholder", "output") or node.target is aten.copy_.default or writes_statistics(node)


class GraphEmitter:
    """Walks a captured graph once and emits the code of one pass; rules see it as their ``Emitter``."""

    def __init__(
        self,
        analysed: AnalysedGraph,
        plan: Plan,
        registry: Registry,
        kind: str,
        updates_buffers: bool,
        following: Collection[str] = (),
        groups: Groups | None = None,
    ) -> None:
        self.captured, self.layouts, self.flow = analysed.captured, analysed.layouts, analysed.flow
        self.plan, self.registry, self.kind, self.updates_buffers = plan, registry, kind, updates_buffers
        self.following, self.groups = following, groups
        self.graph = Graph()
        self.holders = {name: self.graph.placeholder(name) for name in SIGNATURE}
        self.values: dict[Node, Any] = {}
        self.tangents: dict[Node, Any] = {}
        self.stacks: dict[Node, Node] = {}
        self.changes: dict[Node, list[StructuredChange]] = {}
        self.fetched: dict[tuple[str, str], Node] = {}
        self.parameters = {each.name: each for each in plan.parameters}
        self.sites: dict[str, SitePlan] = {site.node: site for site in plan.sites} if self.captured.training else {}
        self.effective = plan.effective.get("training" if self.captured.training else "evaluation", {})
        self.origin: Node | None = None
        values = [node.meta.get("val") for node in self.captured.graph.nodes]
        dtypes = {value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()}
        self.mixed_precision = len(dtypes) > 1

    # ---- the walk

    def run(self) -> Graph:
        """Emit every node, the buffer updates (of a pass that trains the model) and the output."""
        for name in self.captured.inputs:
            given = self.graph.placeholder(_identifier(name))
            given.target = given.name  # fx makes that one unique, also where an input is named like a table
            self.values[self.captured.placeholders()[name]] = given
        for node in self.captured.graph.nodes:
            self.origin = node
            if node.op == "call_function":
                self._emit(node)
                if self.mixed_precision and node in self.flow.carries_batch:
                    self._keep_dtype(node)
            elif node.op == "output":
                self._output(node)
        return self.graph

    def _emit(self, node: Node) -> None:
        rule = self.registry.find(node)
        if self.kind == "base":
            self.values[node] = rule.base(self, node) if rule is not None else self.copy(node)
        elif node.name in self.effective:
            self.values[node] = self.copy(node)
        elif node not in self.flow.carries_batch:
            self._emit_without_batch(node)
        elif node.target is operator.getitem:
            self._emit_item(node)
        elif self._needs_general_way(node, rule):
            self._emit_per_example(node)
        elif self.kind == "response" and self.captured.training and rule is not None and _is_site(node, rule):
            self.values[node] = rule.base(self, node)  # sites hold no parameters: what responds is their input
        elif self.kind == "response":
            self.values[node] = rule.respond(self, node) if rule is not None else self.copy(node)
        else:
            self._emit_linearized(node, rule)

    def _keep_dtype(self, node: Node) -> None:
        """Response parameters are in full precision; what they enter stays in the dtype that the model computes in."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        for table in (self.values, self.tangents) if self.kind == "linearized" else (self.values,):
            if isinstance(table.get(node), Node):
                table[node] = self.call(aten.to.dtype, table[node], value.dtype)

    def _emit_linearized(self, node: Node, rule: Rule | None) -> None:
        if rule is not None:
            self.values[node], tangent = rule.linearize(self, node)
        else:
            self.values[node] = self.copy(node)
            tangent = self._linearized_by_jvp(node)
        if tangent is not None:
            self.tangents[node] = tangent

    def _emit_item(self, node: Node) -> None:
        source, index = node.args
        self.values[node] = self.item(self.values[source], index)
        tangent = self.tangents.get(source)
        if isinstance(tangent, list):
            tangent = tangent[index]
        elif tangent is not None:
            tangent = self.item(tangent, index)
        if tangent is not None and self.floating(node):
            self.tangents[node] = tangent

    def _linearized_by_jvp(self, node: Node) -> Any:
        """An operator without a rule: forward by jvp and backward by vjp of the operator itself."""
        leaves, _ = pytree.tree_flatten((list(node.args), dict(node.kwargs)))
        tangents = [self.tangent(leaf) for leaf in leaves if self._is_tensor(leaf)]
        if all(tangent is None for tangent in tangents) or not self.floating(node) or node.target in _CONSTANT:
            return None
        arguments, options = self._call_arguments(node)
        outputs = node.meta.get("val")
        forward_mode = {"forward_mode": False} if lacks_forward_mode(node, self.registry) else {}
        result = self.call(operator_tangent, node.target, arguments, options, tangents, **forward_mode)
        if not isinstance(outputs, (tuple, list)):
            return result
        floating = [i for i, v in enumerate(outputs) if differentiable(v)]
        parts: list[Any] = [None] * len(outputs)
        for position, index in enumerate(floating):
            parts[index] = self.item(result, position) if len(floating) > 1 else result
        return parts

    # ---- values that depend on parameters only

    def _emit_without_batch(self, node: Node) -> None:
        rule = self.registry.find(node)
        own = rule.without_batch(self, node) if rule is not None else None
        if own is not None:
            self.values[node], stack = own
            if stack is not None:
                self.stacks[node] = stack
            return
        self.values[node] = self.copy(node)
        sources = [n for n in node.all_input_nodes if self.stack(n) is not None]
        if not sources or node.target is aten.detach.default or not self.floating(node):
            return
        if node.target is operator.getitem and self.stack(node.args[0]) is not None:
            self.stacks[node] = self.item(self.stacks[node.args[0]], node.args[1])
            return
        value = node.meta.get("val")
        out: Any = ["stack"] * len(value) if isinstance(value, (tuple, list)) else "stack"
        self.stacks[node] = self._per_example_call(node, out)

    def _needs_general_way(self, node: Node, rule: Rule | None) -> bool:
        stacked = [n for n in node.all_input_nodes if self.stack(n) is not None]
        if not stacked:
            return False
        handled = rule.per_example_arguments if rule is not None else ()
        names = [self.argument_name(node, i) for i, a in enumerate(node.args) if a in stacked]
        names += [name for name, a in node.kwargs.items() if a in stacked]
        inside_lists = len(names) < len(stacked)
        return inside_lists or any(name not in handled for name in names)

    def _emit_per_example(self, node: Node) -> None:
        layout = tuple(self.layouts[node])
        result = self._per_example_call(node, layout)
        if self.kind == "response":
            self.values[node] = result
        else:
            self.values[node] = self.copy(node)
            self.tangents[node] = result

    def _per_example_call(self, node: Node, out: Any) -> Node:
        leaves, spec = pytree.tree_flatten((list(node.args), dict(node.kwargs)))
        modes, tangents, filled = [], [], []
        rule = self.registry.find(node)
        # A linear operator maps changes as it maps values.
        as_values = self.kind == "response" or (rule is not None and rule.linear_in_first)
        for leaf in leaves:
            if not self._is_tensor(leaf):
                filled.append(self._unit(leaf))
                continue
            stack = self.stack(leaf)
            modes.append("stack" if stack is not None else self._mode(leaf))
            tangents.append(stack if stack is not None else self.tangent(leaf))
            filled.append(stack if stack is not None and as_values else self.value(leaf))
        arguments, options = pytree.tree_unflatten(filled, spec)
        target: Any = node.target
        if isinstance(target, FunctionType):  # fx writes operators as arguments, but not functions
            target = self.call(function_by_name, target.__module__, target.__name__)
        if as_values:
            return self.call(per_example, target, arguments, options, modes, out)
        return self.call(per_example_tangent, target, arguments, options, modes, tangents, out)

    def _mode(self, leaf: Node) -> Any:
        return tuple(self.layouts[leaf]) if leaf in self.flow.carries_batch and leaf in self.layouts else "shared"

    def _unit(self, leaf: Any) -> Any:
        """A size as it is at B = 1."""
        if not isinstance(leaf, Node):
            return leaf
        return unit_size(leaf.meta["val"], self.captured.batch_symbol)

    def _is_tensor(self, leaf: Any) -> bool:
        return isinstance(leaf, Node) and isinstance(leaf.meta.get("val"), (Tensor, tuple, list))

    # ---- Emitter: what rules ask for

    def value(self, argument: Any) -> Any:
        return map_arg(argument, self._value_of_node)

    def _value_of_node(self, node: Node) -> Any:
        if node not in self.values:
            self.values[node] = self._fetch("state", self.captured.state[node.name])
        return self.values[node]

    def tangent(self, argument: Any) -> Any:
        return self.tangents.get(argument) if isinstance(argument, Node) else None

    def tangent_or_zeros(self, argument: Any) -> Any:
        tangent = self.tangent(argument)
        return self.call(torch.zeros_like, self.value(argument)) if tangent is None else tangent

    def stack(self, argument: Any) -> Node | None:
        if not isinstance(argument, Node) or self.kind == "base":
            return None
        if argument not in self.stacks and argument.op == "placeholder":
            plan = self._plan_of(argument)
            if plan is not None and plan.structure == "exact":
                change = self.call(exact_change, self._fetch("response", f"{plan.name}.G"), self.holders["delta"])
                if self.kind == "response":
                    change = self.call(aten.add.Tensor, self.value(argument), change)
                self.stacks[argument] = change
        return self.stacks.get(argument)

    def structured(self, argument: Any) -> list[StructuredChange]:
        if not isinstance(argument, Node) or self.kind == "base":
            return []
        if argument not in self.changes:
            changes = self._structured(argument)
            if not changes:
                return []
            self.changes[argument] = changes
        return self.changes[argument]

    def _structured(self, node: Node) -> list[StructuredChange]:
        plan = self._plan_of(node)
        if plan is not None:
            return self._own_changes(plan) if plan.structure in ("row-wise", "low-rank") else []
        if node.op != "call_function" or node in self.flow.carries_batch:
            return []
        operand = linear_operand(node, self.flow.is_fixed)
        parents = [] if operand is None else self.structured(node.args[operand])
        if not parents or map_row_axis(node, operand, parents[0].row_axis, parents[0].left is not None) is None:
            return []
        return [compose(self, node, operand, parent, parent.row_axis) for parent in parents]

    def _own_changes(self, plan: ParameterPlan) -> list[StructuredChange]:
        parts = {part: self._fetch("response", f"{plan.name}.{part}") for part in _PARTS[plan.structure]}
        if plan.terms == 1:
            return [self._own_change(plan, parts)]
        terms = range(plan.terms)
        return [self._own_change(plan, {part: self.item(each, t) for part, each in parts.items()}) for t in terms]

    def _own_change(self, plan: ParameterPlan, parts: dict[str, Node]) -> StructuredChange:
        scales = self.call(row_scales, parts["V"], self.holders["delta"])
        if plan.structure == "row-wise":
            return StructuredChange(parts["U"], scales, plan.row_axis)
        return StructuredChange(parts["B"], scales, plan.row_axis, parts["A"])

    def _plan_of(self, node: Node) -> ParameterPlan | None:
        if node.name in self.effective:
            return self.parameters[self.effective[node.name]]
        names = self.flow.sources.get(node, set()) if node.op == "placeholder" else set()
        return self.parameters.get(next(iter(names))) if names else None

    def layout(self, node: Any) -> Layout:
        return tuple(self.layouts[node])  # type: ignore[return-value]

    def rank(self, argument: Any) -> int:
        return argument.meta["val"].ndim

    def floating(self, node: Node) -> bool:
        value = node.meta.get("val")
        values = value if isinstance(value, (tuple, list)) else [value]
        return any(differentiable(each) for each in values)

    def static_size(self, node: Node, axis: int) -> int:
        return int(node.meta["val"].shape[axis])

    def call(self, target: Callable[..., Any], *arguments: Any, **options: Any) -> Node:
        name = _readable_name(self.origin, target) if self.origin is not None else None
        node = self.graph.create_node("call_function", target, tuple(arguments), options, name=name)
        if self.origin is not None:
            node.meta = {k: v for k, v in self.origin.meta.items() if k in ("stack_trace", "nn_module_stack")}
        return node

    def item(self, source: Any, index: int) -> Any:
        return self.call(operator.getitem, source, index)

    def copy(self, node: Node, /, **replaced: Any) -> Node:
        if not self.updates_buffers and takes_own_statistics(node):
            replaced = {"running_mean": None, "running_var": None} | replaced
        arguments, options = self._call_arguments(node)
        names = _argument_names(node)
        for name, value in replaced.items():
            if name in names and names.index(name) < len(arguments):
                arguments[names.index(name)] = value
            elif value is not None or name in options:
                options[name] = value
        return self.call(node.target, *arguments, **options)

    def follows_statistics(self, node: Node) -> bool:
        return _name_of_statistics(self.captured, node) in self.following

    def copy_with(self, node: Node, position: int, operand: Any, /, **replaced: Any) -> Node:
        return self.copy(node, **{self.argument_name(node, position): operand, **replaced})

    def _call_arguments(self, node: Node) -> tuple[list[Any], dict[str, Any]]:
        return [self.value(a) for a in node.args], {name: self.value(a) for name, a in node.kwargs.items()}

    def argument_name(self, node: Node, position: int) -> str:
        return _argument_names(node)[position]

    def argument(self, node: Node, name: str, default: Any = None) -> Any:
        return _argument(node, name, default)

    def rate(self, node: Node, part: str = "") -> Node | None:
        site = self.sites.get(node.name)
        if site is None or not site.hyperparameters:
            return None
        name = dict(site.hyperparameters)[part] if part else site.hyperparameters[0][1]
        return self.call(hyperparameter_column, self.holders["values"], self.plan.column(name))

    def upper_bound(self, node: Node, part: str) -> int:
        name = dict(self.sites[node.name].hyperparameters)[part]
        high = self.plan.hyperparameters[self.plan.column(name)].high
        if math.isinf(high):
            raise InputError(f"{name} has no upper bound, and its masks have room for so many only. Choose one: high=.")
        return math.ceil(high)

    def option(self, node: Node, name: str) -> Any:
        site = self.sites.get(node.name)
        return False if site is None else site.options.get(name, False)

    @property
    def draws(self) -> Node:
        return self.holders["draws"]

    def site_name(self, node: Node) -> str:
        site = self.sites.get(node.name)
        return f"{site.entry}:{site.node}" if site is not None else node.name

    # ---- details

    def _fetch(self, table: str, name: str) -> Node:
        if (table, name) not in self.fetched:
            node = self.graph.create_node(
                "call_function", operator.getitem, (self.holders[table], name), {}, name=_identifier(name)
            )
            self.fetched[table, name] = node
        return self.fetched[table, name]

    def _output(self, node: Node) -> None:
        if self.updates_buffers:
            for name, update in self.captured.buffer_updates.items():
                # Detached: changes made under no_grad are copied without their region's border.
                new = self.call(aten.detach.default, self.value(update))
                self.call(aten.copy_.default, self._fetch("state", name), new)
        self.origin = None
        results = list(node.args[0]) + self._taps()
        values = [self.value(result) for result in results]
        if self.kind != "linearized":
            self.graph.output(values)
            return
        self.graph.output((values, [self.tangent(result) for result in results]))

    def _taps(self) -> list[Node]:
        """What terms of the loss look at; it follows behind the outputs."""
        nodes = self.captured.graph.nodes if self.captured.training else ()
        return [node for node in nodes if node.target is activation_tap]


def trained_statistics(captured: CapturedGraph) -> set[str]:
    """Qualified names of the buffers that a training graph updates; of norms' statistics the mean stands for both."""
    tracked = {_name_of_statistics(captured, node) for node in captured.graph.nodes if takes_own_statistics(node)}
    return {*captured.buffer_updates, *(name for name in tracked if name)}


def takes_batch_statistics(captured: CapturedGraph) -> bool:
    """Whether a norm standardizes by the statistics of the batch."""
    norms = (node for node in captured.graph.nodes if node.target is aten.batch_norm.default)
    return any(map(takes_own_statistics, norms))


def _name_of_statistics(captured: CapturedGraph, node: Node) -> str | None:
    mean = _argument(node, "running_mean")
    return captured.state.get(mean.name) if isinstance(mean, Node) else None


def _argument_names(node: Node) -> list[str]:
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return [a.name for a in schema.arguments]
    # Functions of stn_fx's own, such as sites; of the builtins only getitem, which is not asked for names.
    return list(inspect.signature(node.target).parameters) if isinstance(node.target, FunctionType) else []


def _argument(node: Node, name: str, default: Any = None) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    names = _argument_names(node)
    position = names.index(name) if name in names else len(node.args)
    return node.args[position] if position < len(node.args) else default


def _is_site(node: Node, rule: Rule) -> bool:
    return "site_entry" in node.meta or bool(getattr(rule, "site", ""))


def function_by_name(module: str, name: str) -> Callable[..., Any]:
    """A function at the top level of a module."""
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def hyperparameter_column(values_BH: Tensor, index: int) -> Tensor:
    """Constrained values (B,) of one hyperparameter."""
    return values_BH[:, index]


def operator_tangent(
    target: Any, arguments: list[Any], options: dict[str, Any], tangents: list[Any], forward_mode: bool = True
) -> Any:
    """Tangent of any operator; ``tangents`` has one entry (or None) for each tensor in the arguments."""
    leaves, spec = pytree.tree_flatten((arguments, options))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    floating = [(i, t) for i, t in zip(where, tangents, strict=True) if differentiable(leaves[i])]

    def on_tensors(*values: Tensor) -> Any:
        filled = list(leaves)
        for (index, _), value in zip(floating, values, strict=True):
            filled[index] = value
        positional, keywords = pytree.tree_unflatten(filled, spec)
        return target(*positional, **keywords)

    primals, directions = tuple(leaves[i] for i, _ in floating), tuple(t for _, t in floating)
    return linearize(on_tensors, primals, directions, forward_mode)


def _identifier(name: str) -> str:
    clean = re.sub(r"\W", "_", name)
    return clean if clean and not clean[0].isdigit() else f"_{clean}"


def _readable_name(node: Node, target: Any) -> str:
    """A node is named after the module that it comes from, then after what it does where that says more."""
    path = _identifier(module_path(node)) if module_path(node) else ""
    what: str = getattr(target, "_opname", None) or str(getattr(target, "__name__", "value"))
    return f"{path}_{what}" if path else what
