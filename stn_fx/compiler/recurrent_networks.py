"""Recurrent networks spelled out: one fused operator over all layers and directions becomes one call for each.

So every layer's input and hidden weights have a place of their own in the graph, and the dropout between layers is a
site like any other, also at p = 0.  Equations and the order of the parameters are those of torch's documentation of
``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from stn_fx.compiler.recurrent_markers import FUSED, PACKED_REMEDY
from stn_fx.errors import CaptureError
from stn_fx.rules.recurrent import recurrent_layer

aten = torch.ops.aten

_MODES = {"lstm": "lstm", "gru": "gru", "rnn_tanh": "tanh", "rnn_relu": "relu"}
_PACKED = {aten.lstm.data, aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data}


def expand_recurrent_networks(graph: Graph) -> None:
    """Replace every recurrent network of ``graph``, in place; values are captured as for any other node.

    Raises:
        CaptureError: for packed sequences.
    """
    for node in list(graph.nodes):
        if node.target in _PACKED:
            raise CaptureError(PACKED_REMEDY)
        if node.target is torch.ops.stn_fx.recurrent_network.default or node.target in FUSED.values():
            with graph.inserting_before(node):
                outputs = _Network(graph, node).outputs()
            for user in list(node.users):
                user.replace_all_uses_with(outputs[user.args[1]])
                graph.erase_node(user)
            graph.erase_node(node)


class _Network:
    """Emits the layers that stand for one fused call; T steps, N examples, F features.

    The layers work sequence-first, (T, N, F); the states of all layers and directions lie along axis 0 of (L, N, F).
    """

    def __init__(self, graph: Graph, node: Node) -> None:
        marked = node.target is torch.ops.stn_fx.recurrent_network.default
        kind, arguments = (node.args[0], node.args[1:]) if marked else (node.target._opname, node.args)  # type: ignore[union-attr]
        self.graph, self.mode = graph, _MODES[str(kind)]
        self.meta = {key: value for key, value in node.meta.items() if key in ("nn_module_stack", "stack_trace")}
        self.input, states, parameters, self.has_biases, self.layers = arguments[:5]
        self.dropout, self.training, bidirectional, self.batch_first = arguments[5:9]
        self.states: list[Any] = list(states) if isinstance(states, (list, tuple)) else [states]
        self.directions = 2 if bidirectional else 1
        self.parameters = self._by_layer(list(parameters))

    def _by_layer(self, parameters: list[Node]) -> Iterator[list[Node | None]]:
        """(w_ih, w_hh, b_ih, b_hh, w_hr) of each layer and direction: biases and projection may be left out."""
        count = len(parameters) // (self.layers * self.directions)
        for first in range(0, len(parameters), count):
            w_ih, w_hh, *rest = parameters[first : first + count]
            biases: list[Node | None] = list(rest[:2]) if self.has_biases else [None, None]
            projection = rest[2 if self.has_biases else 0 :]
            yield [w_ih, w_hh, *biases, projection[0] if projection else None]

    def outputs(self) -> list[Any]:
        """(output, last state of every layer and direction), as the fused call gives them."""
        x = self._call(aten.transpose.int, self.input, 0, 1) if self.batch_first else self.input
        last: list[list[Node]] = [[] for _ in self.states]
        for layer in range(self.layers):
            if layer:
                x = self._call(aten.dropout.default, x, self.dropout, self.training)
            results = [self._direction(x, layer, direction) for direction in range(self.directions)]
            x = self._call(aten.cat.default, [r[0] for r in results], 2) if self.directions == 2 else results[0][0]
            for result in results:
                for states, state in zip(last, result[1:], strict=True):
                    states.append(state)
        output = self._call(aten.transpose.int, x, 0, 1) if self.batch_first else x
        return [output, *(self._call(aten.stack.default, states) for states in last)]

    def _direction(self, x: Node, layer: int, direction: int) -> list[Node]:
        index = layer * self.directions + direction
        states = [self._call(aten.select.int, state, 0, index) for state in self.states]
        hidden, cell = (*states, None)[:2]
        arguments = (self.mode, direction == 1, x, hidden, cell, *next(self.parameters))
        result = self.graph.call_function(recurrent_layer, arguments)
        # Not by running it: the fused operators fix symbolic sizes.
        last = [state.meta["val"] for state in states]
        output = last[0].new_empty((*x.meta["val"].shape[:2], last[0].shape[-1]))
        suffix = f"_l{layer}" + ("_reverse" if direction else "")
        names = {5: f"weight_ih{suffix}", 6: f"weight_hh{suffix}", 9: f"weight_hr{suffix}"}
        result.meta = {**self.meta, "val": (output, *map(torch.empty_like, last)), "weight_names": names}
        return [self._call(operator.getitem, result, index) for index in range(1 + len(states))]

    def _call(self, target: Callable[..., Any], *arguments: Any) -> Node:
        node = self.graph.call_function(target, arguments)
        values = torch.fx.node.map_arg(arguments, lambda n: n.meta["val"])
        node.meta = {**self.meta, "val": target(*values)}
        return node
