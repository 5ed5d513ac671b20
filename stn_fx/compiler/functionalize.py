"""In-place operators made functional, and views of what they changed rebuilt: tangents need values that stay.

Aliases are read off the captured values (views share their storage).  An in-place operator on a view is written back
into its base (``slice_scatter``, ``select_scatter``, or the inverse of a pure view); every other alias that is used
later is rebuilt from the new base.  In-place changes of buffers become an explicit last-moment ``copy_`` that only the
base pass keeps (``buffer_updates``).
"""

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from stn_fx.errors import CaptureError
from stn_fx.rules.structural import copied

aten = torch.ops.aten

NO_GRAD = "captured_under_no_grad"
"""Mark in a node's meta: what it writes into the model's buffers passes no gradient on."""

_RENAMED = {
    aten.bernoulli_.float: lambda x, p=0.5, **_: (aten.bernoulli.p, (x, p)),
    aten.copy_.default: lambda x, source, *_: (copied, (x, source)),
    aten.detach_.default: lambda x: (aten.detach.default, (x,)),
    aten.zero_.default: lambda x: (aten.zeros_like.default, (x,)),
}


def functionalize(graph: Graph, is_buffer: dict[str, str]) -> tuple[Graph, dict[str, Node]]:
    """Functional copy of ``graph``; also the new value of every buffer (placeholder name -> node) that changed.

    Raises:
        CaptureError: an in-place operator without a functional counterpart, or on a view that cannot be written back.
    """
    return _Functionalizer(is_buffer).run(graph)


def takes_own_statistics(node: Node) -> bool:
    """Whether a norm standardizes by the statistics of its input, and writes running ones where it has them."""
    # Of both: input, weight, bias, running_mean, running_var, and whether the input's own statistics are taken.
    return node.target in (aten.batch_norm.default, aten.instance_norm.default) and bool(node.args[5])


def writes_statistics(node: Node) -> bool:
    """Whether a norm updates running statistics: the one kind of node that has an effect beside its value."""
    return takes_own_statistics(node) and node.args[3] is not None


class _Functionalizer:
    def __init__(self, is_buffer: dict[str, str]) -> None:
        self.is_buffer = is_buffer
        self.graph = Graph()
        self.env: dict[Node, Node] = {}
        self.base: dict[Node, Node] = {}  # view -> what it is a view of
        self.version: dict[Node, int] = {}  # root -> how often it was changed
        self.built: dict[Node, int] = {}  # node -> version of its root that env holds
        self.changed_buffers: dict[str, Node] = {}

    def run(self, graph: Graph) -> tuple[Graph, dict[str, Node]]:
        for node in graph.nodes:
            if node.op == "output":
                self.graph.output(map_arg(node.args[0], self.current))
            elif (written := written_argument(node)) is not None:
                self.mutate(node, written)
            else:
                self.env[node] = self.graph.node_copy(node, self.current)
                self.note_alias(node)
        return self.graph, self.changed_buffers

    def note_alias(self, node: Node) -> None:
        source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if source is not None and shares_storage(node, source):
            self.base[node] = source
        self.built[node] = self.version.get(self.root(node), 0)

    def root(self, node: Node) -> Node:
        while node in self.base:
            node = self.base[node]
        return node

    def current(self, node: Node) -> Node:
        """The node's value in the new graph, rebuilt if something that it aliases has changed since."""
        version = self.version.get(self.root(node), 0)
        if self.built.get(node, 0) != version:
            rebuilt = self.graph.node_copy(node, self.current)
            self.env[node], self.built[node] = rebuilt, version
        return self.env[node]

    def mutate(self, node: Node, written: Node) -> None:
        """Emit the functional form of ``node``, and make its value that of ``written``, the tensor it writes into."""
        target, own_arguments = _functional_form(node)
        arguments = node.args if own_arguments is None else own_arguments
        options = {name: a for name, a in node.kwargs.items() if a is not written} if own_arguments is None else {}
        new = self.graph.call_function(target, map_arg(arguments, self.current), map_arg(options, self.current))
        new.meta = dict(node.meta)
        root = self.root(written)
        if root.op == "placeholder" and node.meta.get(NO_GRAD):
            new = self.graph.call_function(aten.detach.default, (new,))
            new.meta = dict(node.meta)
        version = self.version[root] = self.version.get(root, 0) + 1
        view: Any = written
        alias = view
        value = new
        while True:
            self.env[alias], self.built[alias] = value, version
            if alias not in self.base:
                break
            value = self.write_back(alias, value)
            alias = self.base[alias]
        self.env[node], self.base[node] = new, view
        self.built[node] = version
        if root.op == "placeholder" and root.name in self.is_buffer:
            self.changed_buffers[root.name] = self.env[root]

    def write_back(self, view: Node, value: Node) -> Node:
        """The base of ``view`` with ``value`` written into it."""
        parent = self.base[view]
        whole = self.env[parent]
        target, arguments = view.target, map_arg(view.args[1:], self.current)
        if target is aten.slice.Tensor:
            new = self.graph.call_function(aten.slice_scatter.default, (whole, value, *arguments))
        elif target is aten.select.int:
            new = self.graph.call_function(aten.select_scatter.default, (whole, value, *arguments))
        elif target in (aten.transpose.int,):
            new = self.graph.call_function(target, (value, *arguments))
        elif target is aten.permute.default:
            order = list(arguments[0])
            inverse = [order.index(axis) for axis in range(len(order))]
            new = self.graph.call_function(target, (value, inverse))
        elif _same_elements(view, parent):
            new = self.graph.call_function(aten.reshape_as.default, (value, whole))
        else:
            raise CaptureError(
                f"{where(view)}: an in-place operator changes a view made by {target}, which cannot be written back "
                f"into its base. Write the change out of place (x = x.add(...) instead of x.add_(...)).",
                module_path(view),
            )
        new.meta = dict(parent.meta)
        return new


def written_argument(node: Node) -> Node | None:
    """The argument that this call writes into: its first, or ``out=`` (``batch_norm``'s hidden update is not meant)."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    arguments = node.target._schema.arguments
    if arguments and arguments[-1].is_out:
        return node.kwargs[arguments[-1].name]  # type: ignore[return-value]
    writes = bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write
    return node.args[0] if writes and isinstance(node.args[0], Node) else None


def _functional_form(node: Node) -> tuple[Any, tuple[Any, ...] | None]:
    """Functional operator, and its arguments where they differ from those of the in-place one."""
    if node.target in _RENAMED:
        return _RENAMED[node.target](*node.args, **node.kwargs)
    name, overload = node.target._opname, node.target._overloadname
    packet = getattr(aten, name.rstrip("_"), None) if name.endswith("_") else None
    if packet is not None and overload in packet.overloads():
        return getattr(packet, overload), None
    without_out = _without_out(node.target)
    if without_out is not None:
        return without_out, None
    raise CaptureError(
        f"{where(node)}: {node.target} changes a tensor in place and has no functional counterpart. Write it out of "
        f"place, or add a rule for the module.",
        module_path(node),
    )


def _without_out(target: Any) -> Any:
    """The overload that returns what ``target`` writes into its one ``out=``; None where there is none."""
    arguments = [(a.name, str(a.type)) for a in target._schema.arguments if not a.is_out]
    if len(target._schema.arguments) != len(arguments) + 1:
        return None
    packet = target.overloadpacket
    for overload in (getattr(packet, name) for name in packet.overloads()):
        if [(a.name, str(a.type)) for a in overload._schema.arguments] == arguments:
            return overload
    return None


def shares_storage(node: Node, other: Node) -> bool:
    """Whether the captured values of two nodes are views of the same memory."""
    left, right = node.meta.get("val"), other.meta.get("val")
    if not isinstance(left, Tensor) or not isinstance(right, Tensor) or node.target is operator.getitem:
        return False
    try:
        return left.untyped_storage()._cdata == right.untyped_storage()._cdata
    except NotImplementedError as error:
        raise CaptureError(
            f"{where(node)}: a torch.func transform (vmap, grad, jvp) inside of a forward cannot be captured. Write it "
            f"as plain tensor code.",
            module_path(node),
        ) from error


def _same_elements(view: Node, parent: Node) -> bool:
    left, right = view.meta["val"], parent.meta["val"]
    return bool(left.numel() == right.numel())


def where(node: Node) -> str:
    """Place of a node in the user's terms: module path and source line."""
    path = module_path(node)
    trace = (node.meta.get("stack_trace") or "").strip().splitlines()
    line = trace[-1].strip() if trace else str(node.target)
    return f"{path or 'the model'} ({line})"


def module_path(node: Node) -> str:
    """Qualified name of the innermost module that the node was captured in; "" for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0].split("@")[0] if stack else ""
    # torch.export's stand-in for "no module" is not a path.
    return "" if path.startswith("_empty_nn_module_stack") else path
