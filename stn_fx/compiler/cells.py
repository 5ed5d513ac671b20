"""Recurrent cells spelled out: one fused operator per step becomes linear layers and gates, which have rules.

So the weights of ``nn.LSTMCell``, ``nn.GRUCell`` and ``nn.RNNCell`` respond row-wise like those of any linear layer.
The equations are those of torch's documentation.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten


def expand_cells(graph: Graph) -> None:
    """Replace every fused recurrent cell of ``graph``, in place; values are captured as for any other node."""
    for node in list(graph.nodes):
        expansion = _EXPANSIONS.get(node.target) if node.op == "call_function" else None
        if expansion is None:
            continue
        with graph.inserting_before(node):
            result = expansion(_Builder(graph, node), *_padded(node.args))
        if isinstance(result, Node):
            node.replace_all_uses_with(result)
        else:
            for user in list(node.users):
                user.replace_all_uses_with(result[user.args[1]])
                graph.erase_node(user)
        graph.erase_node(node)


class _Builder:
    """Emits calls that stand for one cell, each with its captured value and its place in the user's code."""

    def __init__(self, graph: Graph, cell: Node) -> None:
        self.graph = graph
        self.meta = {key: value for key, value in cell.meta.items() if key in ("nn_module_stack", "stack_trace")}

    def __call__(self, target: Callable[..., Any], *arguments: Any) -> Node:
        node = self.graph.call_function(target, arguments)
        values = torch.fx.node.map_arg(arguments, lambda n: n.meta["val"])
        node.meta = {**self.meta, "val": target(*values)}
        return node

    def gates(self, x: Node, count: int) -> list[Node]:
        """The parts of a fused layer's output."""
        parts = self(aten.chunk.default, x, count, 1)
        return [self(operator.getitem, parts, index) for index in range(count)]

    def add(self, left: Node, right: Node) -> Node:
        return self(aten.add.Tensor, left, right)

    def mul(self, left: Node, right: Node) -> Node:
        return self(aten.mul.Tensor, left, right)


def _padded(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """(input, state, w_ih, w_hh, b_ih, b_hh): biases may be left out."""
    return (*arguments, *(None,) * (6 - len(arguments)))


def _lstm(call: _Builder, x: Node, state: Any, w_ih: Node, w_hh: Node, b_ih: Any, b_hh: Any) -> tuple[Node, Node]:
    hidden, cell = state
    total = call.add(call(aten.linear.default, x, w_ih, b_ih), call(aten.linear.default, hidden, w_hh, b_hh))
    enter, forget, candidate, leave = call.gates(total, 4)
    kept = call.mul(call(aten.sigmoid.default, forget), cell)
    entered = call.mul(call(aten.sigmoid.default, enter), call(aten.tanh.default, candidate))
    cell = call.add(kept, entered)
    return call.mul(call(aten.sigmoid.default, leave), call(aten.tanh.default, cell)), cell


def _gru(call: _Builder, x: Node, hidden: Node, w_ih: Node, w_hh: Node, b_ih: Any, b_hh: Any) -> Node:
    reset_x, update_x, new_x = call.gates(call(aten.linear.default, x, w_ih, b_ih), 3)
    reset_h, update_h, new_h = call.gates(call(aten.linear.default, hidden, w_hh, b_hh), 3)
    reset = call(aten.sigmoid.default, call.add(reset_x, reset_h))
    update = call(aten.sigmoid.default, call.add(update_x, update_h))
    new = call(aten.tanh.default, call.add(new_x, call.mul(reset, new_h)))
    return call.add(new, call.mul(update, call(aten.sub.Tensor, hidden, new)))


def _rnn(activation: Any) -> Callable[..., Node]:
    def expand(call: _Builder, x: Node, hidden: Node, w_ih: Node, w_hh: Node, b_ih: Any, b_hh: Any) -> Node:
        total = call.add(call(aten.linear.default, x, w_ih, b_ih), call(aten.linear.default, hidden, w_hh, b_hh))
        return call(activation, total)

    return expand


_EXPANSIONS: dict[Any, Callable[..., Any]] = {
    aten.lstm_cell.default: _lstm,
    aten.gru_cell.default: _gru,
    aten.rnn_tanh_cell.default: _rnn(aten.tanh.default),
    aten.rnn_relu_cell.default: _rnn(aten.relu.default),
}
