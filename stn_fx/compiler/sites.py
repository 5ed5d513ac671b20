"""Sites: the places in the training graph that hyperparameters act on, those of the model and those inserted into it.

Inserted sites (DESIGN 3.11) stand where the standard recipes put them: on the branch of each residual block, else after
each activation, and before the classifier; or at the outputs of modules that the user names with a pattern.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from stn_fx.augment.image_format import ImageFormat
from stn_fx.compiler.activation_sites import choose_activation_sites
from stn_fx.compiler.capture import CapturedGraph
from stn_fx.compiler.functionalize import module_path
from stn_fx.compiler.input_sites import choose_input_sites
from stn_fx.compiler.insertion import Insertion
from stn_fx.compiler.layouts import symbolic_axes
from stn_fx.hparams import Selection
from stn_fx.hparams.pattern import matches
from stn_fx.rules import Registry
from stn_fx.rules.custom import reference
from stn_fx.rules.recurrent import recurrent_layer

aten = torch.ops.aten

_ADDITIONS = {aten.add.Tensor}
_ACTIVATIONS = {"relu", "relu6", "gelu", "silu", "hardswish", "elu", "selu", "leaky_relu", "tanh", "mish", "hardtanh"}
_LAYERS = {"linear", "addmm", "conv1d", "conv2d", "conv3d", "matmul"}


@dataclass(frozen=True)
class FoundSite:
    """One site: catalogue entry, qualified name, node of the training graph, and the author's own rate."""

    name: str
    entry: str
    node: Node
    own_rate: float
    inserted: bool = False
    own_values: tuple[float, ...] = ()
    """What the author gave to each component of the entry, where that is more than the rate."""


def find_sites(captured: CapturedGraph, model: nn.Module, registry: Registry) -> list[FoundSite]:
    """Every site of the training graph, in order, with unique names (one name for each module)."""
    modules = dict(model.named_modules())
    _mark_attention_dropouts(captured, modules)
    found: list[FoundSite] = []
    counts: dict[str, int] = {}
    for node in captured.graph.nodes:
        rule: Any = registry.find(node)
        entry = node.meta.get("site_entry") or getattr(rule, "site", None)
        if entry is None or not rule.is_site(node):
            continue
        named = rule.found_as(node)
        if named is not None:
            name, entry = named
            found.append(FoundSite(name, entry, node, rule.own_rate(node), own_values=rule.own_values(node)))
            continue
        if "site_name" in node.meta:
            found.append(FoundSite(node.meta["site_name"], entry, node, rule.own_rate(node), inserted=True))
            continue
        name = node.meta.get("attention_dropout") or _site_name(node, modules, counts)
        found.append(FoundSite(name, entry, node, rule.own_rate(node)))
    return found


def _site_name(node: Node, modules: dict[str, nn.Module], counts: dict[str, int]) -> str:
    path = module_path(node)
    module = modules.get(path)
    if module is not None and not list(module.children()) and path and "Drop" in type(module).__name__:
        return path
    if isinstance(module, nn.Module) and ("Drop" in type(module).__name__ or "Depth" in type(module).__name__) and path:
        return path
    if isinstance(module, nn.MultiheadAttention):
        return path
    stem = f"{path}.dropout" if path else "functional"
    counts[stem] = counts.get(stem, 0) + 1
    return stem if counts[stem] == 1 else f"{stem}_{counts[stem] - 1}"


def _mark_attention_dropouts(captured: CapturedGraph, modules: dict[str, nn.Module]) -> None:
    """Fused attention takes the rate of a dropout module that is never called: that module names the site."""
    called = {module_path(node) for node in captured.graph.nodes if node.op == "call_function"}
    for node in captured.graph.nodes:
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        path = module_path(node)
        module = modules.get(path)
        for child, submodule in module.named_children() if module is not None else ():
            qualified = f"{path}.{child}" if path else child
            if isinstance(submodule, nn.Dropout) and qualified not in called:
                node.meta["attention_dropout"] = qualified
                break


def choose_insertions(
    captured: CapturedGraph,
    model: nn.Module,
    selections: list[Selection],
    found: list[FoundSite],
    image_format: ImageFormat | None = None,
) -> list[Insertion]:
    """Sites to insert for selections that the model has no site for, and for input augmentations. Pure.

    Raises:
        InputError: a selection acts on what pixels mean, and the input or its format does not allow that.
    """
    own = [each for each in selections if any(each.entry.name == s.entry and each.matches(s.name) for s in found)]
    insertions = choose_input_sites(captured, [each for each in selections if each not in own], image_format)
    insertions += choose_activation_sites(captured, selections)
    for selection in selections:
        entry = selection.entry.name
        if selection.entry.kind == "site" and selection.required:
            if any(site.entry == entry and selection.matches(site.name) for site in found):
                continue
            if entry == "weight_drop":
                insertions += [each for each in _recurrent_layers(captured) if selection.matches(each.name)]
            elif selection.pattern is not None:
                apply = selection.entry.apply
                arguments = () if apply is None else (reference(apply), selection.entry.per_batch)
                outputs = _module_outputs(captured, model, entry, selection.pattern)
                insertions += [replace(each, arguments=arguments) for each in outputs]
            elif not any(site.entry == entry for site in found):
                insertions += _recipe(captured, entry)
    return insertions


def _recurrent_layers(captured: CapturedGraph) -> Iterator[Insertion]:
    """One site before each layer and direction of each recurrent network, named after its hidden weight."""
    for node in captured.graph.nodes:
        if node.target is recurrent_layer:
            yield Insertion("weight_drop", _hidden_weight(node), node.args[2], (node,))


def _hidden_weight(layer: Node) -> str:
    """Qualified name of a recurrent layer's hidden weight."""
    path, attribute = module_path(layer), layer.meta["weight_names"][6]
    return f"{path}.{attribute}" if path else attribute


def _module_outputs(captured: CapturedGraph, model: nn.Module, entry: str, pattern: str) -> list[Insertion]:
    """One site at the output of each module that the pattern names (not of those below it)."""
    insertions = []
    for name, _ in model.named_modules():
        if not name or not _names_module(pattern, name):
            continue
        inside = [node for node in captured.graph.nodes if _is_inside(node, name) and _is_activation(node, captured)]
        outputs = [n for n in inside if any(not _is_inside(user, name) for user in n.users)]
        if outputs:
            last = outputs[-1]
            users = tuple(user for user in last.users if not _is_inside(user, name))
            insertions.append(Insertion(entry, name, last, users))
    return insertions


def _names_module(pattern: str, name: str) -> bool:
    parent = name.rpartition(".")[0]
    return matches(pattern, name) and not (parent and matches(pattern, parent))


def _recipe(captured: CapturedGraph, entry: str) -> list[Insertion]:
    branches = _residual_branches(captured)
    if entry == "drop_path":
        return _named(entry, branches)
    places: list[Any] = list(branches)
    if not branches:
        nodes = [n for n in captured.graph.nodes if _operator_name(n) in _ACTIVATIONS and _is_activation(n, captured)]
        places = [(module_path(node) or node.name, node, None) for node in nodes]
    classifier = _classifier(captured)
    if classifier is not None:
        before = classifier.args[0]
        if isinstance(before, Node) and all(node is not before for _, node, _ in places):
            places = [*places, (module_path(classifier) or classifier.name, before, (classifier,))]
    return _named(entry, places)


def _named(entry: str, places: list[Any]) -> list[Insertion]:
    seen: dict[str, int] = {}
    insertions = []
    for name, node, users in places:
        seen[name] = seen.get(name, 0) + 1
        unique = name if seen[name] == 1 else f"{name}_{seen[name] - 1}"
        insertions.append(Insertion(entry, unique, node, users))
    return insertions


def _residual_branches(captured: CapturedGraph) -> list[Any]:
    """(module, branch output, the addition) of each residual block: a sum, one operand of which came the longer way."""
    order = {node: i for i, node in enumerate(captured.graph.nodes)}
    depth: dict[Node, int] = {}
    for node in captured.graph.nodes:
        below = max((depth.get(n, 0) for n in node.all_input_nodes), default=0)
        depth[node] = below + (_operator_name(node) in _LAYERS)
    lineage = _lineages(captured)
    branches = []
    for node in captured.graph.nodes:
        if node.target not in _ADDITIONS or not _is_activation(node, captured):
            continue
        operands = [a for a in node.args[:2] if isinstance(a, Node) and _is_activation(a, captured)]
        if len(operands) != 2 or operands[0].meta["val"].shape != operands[1].meta["val"].shape:
            continue
        branch, skip = sorted(operands, key=lambda n: (depth[n], order[n]), reverse=True)
        # Both operands come from one activation: the skip lies on the branch's way, or its source does.
        if depth[branch] > depth[skip] and lineage[branch] & lineage[skip]:
            branches.append((module_path(node) or node.name, branch, (node,)))
    return branches


def _lineages(captured: CapturedGraph) -> dict[Node, int]:
    """For every node, itself and all values that it comes from, parameters apart, as the bits of one number."""
    lineage: dict[Node, int] = {}
    for position, node in enumerate(captured.graph.nodes):
        own = 0 if node.name in captured.state else 1 << position
        for source in node.all_input_nodes:
            own |= lineage[source]
        lineage[node] = own
    return lineage


def _classifier(captured: CapturedGraph) -> Node | None:
    layers = [node for node in captured.graph.nodes if _operator_name(node) in ("linear", "addmm")]
    return layers[-1] if layers else None


def _is_activation(node: Node, captured: CapturedGraph) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and bool(symbolic_axes(value, captured.batch_symbol))


def _is_inside(node: Node, module: str) -> bool:
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return any(path.split("@")[0] == module for path, *_ in stack)


def _operator_name(node: Node) -> str:
    return getattr(node.target, "_opname", "") if node.op == "call_function" else ""
