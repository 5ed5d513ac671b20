"""Analysis: where the batch lies in every value of a captured graph.  Decided by evidence, never guessed.

Symbolic shapes say which axes depend on the batch size.  A dependency probe says which rows belong to which example:
the graph runs on three examples with random parameters, one example poisoned with NaN, and the rows that turn NaN are
that example's.  Norms run on fixed statistics and nothing is dropped, so that examples stay independent; a value in
which they do not (a mean over the batch) has no layout.  Token inputs cannot hold NaN: there, the floating values that
are first computed from them are poisoned.
"""

import contextlib
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from stn_fx.compiler.capture import CapturedGraph, CapturedModel
from stn_fx.compiler.thinned import draw, run_thinned, weight_of
from stn_fx.rules.layout import BatchLayout
from stn_fx.rules.markers import is_marker
from stn_fx.rules.tangent import differentiable

aten = torch.ops.aten
PROBE_EXAMPLES, POISONED = 3, 1

_IDENTITIES = {
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default,
    torch.ops.stn_fx.drop_path.default,
}  # fmt: skip


def analyse_layouts(captured: CapturedGraph, model: CapturedModel, state: dict[str, Tensor]) -> dict[Node, BatchLayout]:
    """Layout of every node that carries the batch and whose layout is decided; found once for a graph."""
    size = len(captured.graph.nodes)
    if captured.layouts is not None and captured.layouts[0] == size:  # nothing was inserted since
        return captured.layouts[1]
    rows = _poisoned_rows(captured, model, state)
    layouts = {}
    for node in captured.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        axes = symbolic_axes(value, captured.batch_symbol)
        layout = _decide(axes, rows.get(node)) or _of_repeated(node, axes)
        if layout is not None:
            layouts[node] = layout
    _agree_with_users(layouts, rows)
    captured.layouts = (size, layouts)
    return layouts


def symbolic_axes(value: Tensor, symbol: Any) -> dict[int, int | None]:
    """Axes whose size depends on the batch size: axis -> coefficient (None where it is not a multiple)."""
    found: dict[int, int | None] = {}
    for axis, size in enumerate(value.shape):
        if isinstance(size, torch.SymInt) and symbol in getattr(size.node.expr, "free_symbols", ()):
            ratio = size.node.expr / symbol
            found[axis] = int(ratio) if getattr(ratio, "is_Integer", False) else None
    return found


def unit_size(size: Any, symbol: Any) -> Any:
    """The size at B = 1."""
    expression = size.node.expr if isinstance(size, torch.SymInt) else None
    return size if expression is None else int(expression.subs(symbol, 1))


def _decide(axes: dict[int, int | None], rows: dict[int, set[int]] | None) -> BatchLayout | None:
    """Layout from the symbolic axes and the poisoned rows along each (None = the probe could not see this value)."""
    if rows is None or not any(rows.values()):  # integers, booleans, values alike for all: the shape, if it is plain
        plain = [axis for axis, count in axes.items() if count == 1]
        return BatchLayout(plain[0]) if len(axes) == 1 and plain else None
    fitting = []
    for axis, count in axes.items():
        for inner in range(1, (count or 0) + 1):
            if count is None or count % inner:
                continue
            outer = count // inner
            expected = {(o * PROBE_EXAMPLES + POISONED) * inner + i for o in range(outer) for i in range(inner)}
            if rows.get(axis) and rows[axis] <= expected and _covers(rows[axis], expected, outer, inner):
                fitting.append(BatchLayout(axis, outer, inner))
    return fitting[0] if len(fitting) == 1 else None


def _of_repeated(node: Node, axes: dict[int, int | None]) -> BatchLayout | None:
    """``repeat(B, ...)`` of a value that is the same for all examples: one copy after the other, batch-major."""
    if node.target is not aten.repeat.default or len(axes) != 1:
        return None
    ((axis, count),) = axes.items()
    source = node.args[0].meta["val"]
    added = len(node.args[1]) - source.ndim
    rows = source.shape[axis - added] if axis >= added else 1
    # As many copies as examples, neither more nor fewer, so that a copy is an example's.
    return BatchLayout(axis, 1, count) if isinstance(rows, int) and count == rows else None


def _agree_with_users(layouts: dict[Node, BatchLayout], rows: dict[Node, dict[int, set[int]]]) -> None:
    """Drop the layout of a repeated value where an operator uses its rows for other examples."""
    for node in [n for n in layouts if n.target is aten.repeat.default and n not in rows]:
        layout, seen, frontier = layouts[node], {node}, [node]
        while frontier:
            for user in frontier.pop().users:
                if user in rows:
                    met = layouts.get(user)
                    if met is not None and met.outer * met.inner == layout.inner and met.inner != layout.inner:
                        layouts.pop(node, None)
                elif user not in seen:
                    seen.add(user)
                    frontier.append(user)


def _covers(rows: set[int], expected: set[int], outer: int, inner: int) -> bool:
    return outer * inner == 1 or rows == expected


def _poisoned_rows(
    captured: CapturedGraph, model: CapturedModel, state: dict[str, Tensor]
) -> dict[Node, dict[int, set[int]]]:
    """For every floating value that the poison reaches: along each batch axis, the rows that hold a NaN."""
    generator = torch.Generator().manual_seed(0)
    env: dict[Node, Any] = {}
    carries: set[Node] = set()
    found: dict[Node, dict[int, set[int]]] = {}
    inputs = dict(zip(captured.inputs, zip(model.example, model.batch_axes, strict=True), strict=True))
    depends = _dependent(captured, {name for name, (_, axis) in inputs.items() if axis is not None})
    weights = {node: weight_of(node, depends) for node in captured.graph.nodes if node.op == "call_function"}
    last_use = _last_uses(captured)
    for position, node in enumerate(captured.graph.nodes):
        if node.op == "output":
            break
        if node.op == "placeholder":
            if node.name not in inputs and _is_only_weight(node, weights):
                env[node] = state[captured.state[node.name]].detach()  # of which the shape is all that is used
            else:
                env[node] = _probe_placeholder(node, captured, inputs, state, generator)
            if node in depends and differentiable(env[node]):
                _poison(env[node], inputs[node.name][1])
                carries.add(node)
        else:
            # Sizes carry no example's values: an expanded class token depends on none.
            sources = {n for n in node.all_input_nodes if isinstance(env[n], (Tensor, tuple, list))}
            poisoned = {n: env[n] for n in sources & carries}
            if _is_integer(node.meta.get("val")):  # a NaN would become an index out of range
                poisoned = {n: torch.nan_to_num(v) if differentiable(v) else v for n, v in poisoned.items()}
            if weights[node] is not None:
                env[node] = run_thinned(node, map_arg(node.args, lambda n: env[n]), generator)
            else:
                env[node] = _run_poisoned(node, env | poisoned, captured.batch_symbol)
            if sources & carries and not _is_integer(node.meta.get("val")):
                carries.add(node)
            elif node in depends and _can_poison(node, captured):
                env[node] = env[node].clone()
                _poison(env[node], next(iter(symbolic_axes(node.meta["val"], captured.batch_symbol))))
                carries.add(node)
        value = env[node]
        if node in carries and differentiable(value):
            axes = symbolic_axes(node.meta["val"], captured.batch_symbol)
            bad = value.isnan()
            found[node] = {axis: _rows(bad, axis) for axis in axes}
        for done in last_use.get(position, ()):
            env.pop(done, None)
    return found


def _dependent(captured: CapturedGraph, batched_inputs: Container[str]) -> set[Node]:
    """Values that hold something of the examples, rather than of their number."""
    found: set[Node] = set()
    for node in captured.graph.nodes:
        given = node.name in batched_inputs if node.op == "placeholder" else False
        if given or any(n in found and isinstance(n.meta["val"], (Tensor, tuple, list)) for n in node.all_input_nodes):
            found.add(node)
    return found


def _is_only_weight(node: Node, weights: Mapping[Node, Node | None]) -> bool:
    """Whether all users take the value as the weight of a thinned layer, and for nothing else."""
    return all(weights.get(user) is node and sum(a is node for a in user.args) == 1 for user in node.users)


def _run_poisoned(node: Node, env: dict[Node, Any], symbol: Any) -> Any:
    """The node's value; where it refuses NaN (decompositions, sampling, assertions), NaN where its value depends on it.

    That shows when it runs twice, with other examples in place of the poisoned one; if it refuses these too, everything
    may depend on it.
    """
    try:
        return run_node(node, env)
    except Exception:  # torch's LinAlgError, or whatever the code of an opaque leaf raises
        sources = [n for n in node.all_input_nodes if isinstance(env[n], Tensor) and differentiable(env[n])]
        values = []
        for other in (0, -1):
            with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                values.append(run_node(node, env | {n: _with_other_example(env[n], n, symbol, other) for n in sources}))
        if len(values) < 2:
            return pytree.tree_map(lambda value: _all_poisoned(value, symbol), node.meta["val"])
        return pytree.tree_map(_poisoned_where_different, *values)


def _with_other_example(value: Tensor, node: Node, symbol: Any, other: int) -> Tensor:
    """The value with the rows of the poisoned example replaced by those of another, the first (0) or the last (-1)."""
    value = value.clone()
    for axis in symbolic_axes(node.meta["val"], symbol):
        bad = sorted(_rows(value.isnan(), axis))
        clean = [row for row in range(value.shape[axis]) if row not in bad]
        if bad and len(clean) >= len(bad):
            chosen = clean[: len(bad)] if other == 0 else clean[-len(bad) :]
            value.index_copy_(axis, torch.tensor(bad), value.index_select(axis, torch.tensor(chosen)))
    return value.nan_to_num(1.0 if other == 0 else 2.0)


def _poisoned_where_different(first: Any, second: Any) -> Any:
    if not isinstance(first, Tensor) or not differentiable(first):
        return first
    return first.masked_fill(first != second, float("nan"))


def _all_poisoned(value: Any, symbol: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    sizes = [int(s.node.expr.subs(symbol, PROBE_EXAMPLES)) if isinstance(s, torch.SymInt) else s for s in value.shape]
    return torch.full(sizes, float("nan") if differentiable(value) else 1, dtype=value.dtype)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and not differentiable(value) and value.dtype != torch.bool


def _last_uses(captured: CapturedGraph) -> dict[int, list[Node]]:
    last: dict[Node, int] = {}
    for position, node in enumerate(captured.graph.nodes):
        for source in node.all_input_nodes:
            last[source] = position
    uses: dict[int, list[Node]] = {}
    for node, position in last.items():
        uses.setdefault(position, []).append(node)
    return uses


def _rows(bad: Tensor, axis: int) -> set[int]:
    others = [a for a in range(bad.ndim) if a != axis]
    along = bad.any(dim=others) if others else bad
    return set(along.nonzero().flatten().tolist())


def _poison(value: Tensor, axis: int) -> None:
    value.select(axis, POISONED).fill_(float("nan"))


def _can_poison(node: Node, captured: CapturedGraph) -> bool:
    value = node.meta.get("val")
    if not differentiable(value):
        return False
    axes = symbolic_axes(value, captured.batch_symbol)
    return len(axes) == 1 and next(iter(axes.values())) == 1


def _probe_placeholder(
    node: Node, captured: CapturedGraph, inputs: dict[str, Any], state: dict[str, Tensor], generator: torch.Generator
) -> Any:
    if node.name in inputs:
        value, axis = inputs[node.name]
        if axis is None:
            return value
        rows = torch.arange(PROBE_EXAMPLES, device=value.device) % value.shape[axis]
        return value.index_select(axis, rows)
    tensor = state[captured.state[node.name]].detach()
    if isinstance(state[captured.state[node.name]], torch.nn.Parameter) and tensor.is_floating_point():
        # Positive, so that nothing cancels; layers keep the size of values, since an overflow would look like poison.
        fan_in = tensor.numel() / max(1, tensor.shape[0]) if tensor.ndim > 1 else 1.0
        return draw(tuple(tensor.shape), tensor, 1 / fan_in, generator)
    return tensor.clone()


def run_node(node: Node, env: dict[Node, Any], fixed_statistics: bool = True) -> Any:
    """Value of a call with nothing dropped; batch norms use fixed statistics, or the batch's without keeping them."""
    if node.target in _IDENTITIES or is_marker(node.target):
        return env[node.args[0]]
    arguments, options = map_arg(node.args, lambda n: env[n]), map_arg(dict(node.kwargs), lambda n: env[n])
    if node.target is aten.batch_norm.default:
        x, weight, bias, mean, variance, training, momentum, eps, cudnn = arguments
        if training and not fixed_statistics:
            mean = variance = None
        else:
            mean = x.new_zeros(x.shape[1]) if mean is None else mean
            variance = torch.ones_like(mean) if variance is None else variance
            training = False
        arguments = (x, weight, bias, mean, variance, training, momentum, eps, cudnn)
    if node.target is aten.scaled_dot_product_attention.default:
        arguments = (*arguments[:4], 0.0, *arguments[5:]) if len(arguments) > 4 else arguments
        options = {name: value for name, value in options.items() if name != "dropout_p"}
    with torch.no_grad():
        return node.target(*arguments, **options)
