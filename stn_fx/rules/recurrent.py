"""Layers of recurrent networks: LSTM (also with a projection), GRU, and RNN with tanh or relu.

The base pass keeps torch's fused operator.  The linearized pass takes the primal from it as well; the tangent follows
from the states that it gives (``recurrent_tangent``).  The response pass steps over time with per-example weights
(``recurrent_response``).  A layer's values are sequence-first, (T, N, F).
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from stn_fx.errors import BatchLayoutError, CaptureError
from stn_fx.rules.layout import align
from stn_fx.rules.recurrent_response import recurrent_response
from stn_fx.rules.recurrent_tangent import recurrent_tangent
from stn_fx.rules.rule import REGISTRY, Emitter, Layout, Rule
from stn_fx.rules.weight_drop import dropped_layer, dropped_tangent, hidden_mask, weight_drop_site

aten = torch.ops.aten

_FUSED = {"gru": aten.gru.input, "tanh": aten.rnn_tanh.input, "relu": aten.rnn_relu.input}


def recurrent_layer(
    mode: str,
    reverse: bool,
    x: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
) -> tuple[Tensor, ...]:
    """One layer in one direction by torch's fused operator.

    Args:
        mode: "lstm", "gru", "tanh" or "relu".
        reverse: whether the layer runs from the last step to the first.
        x: (T, N, F).
        hidden: initial hidden state (N, P).
        cell: initial cell state (N, H), for an LSTM.
        w_ih: and the others, as torch documents them; ``w_hr`` is the projection of an LSTM with ``proj_size``.

    Returns:
        Output (T, N, P), last hidden state (N, P), and for an LSTM last cell state (N, H).
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:  # the fused kernels have no rules for torch.func
        return recurrent_response(mode, reverse, x, hidden, cell, (w_ih, w_hh, b_ih, b_hh, w_hr), (None,) * 5)
    x = x.flip(0) if reverse else x
    parameters = [p for p in (w_ih, w_hh, b_ih, b_hh, w_hr) if p is not None]
    # cuDNN can only run backward what ran in training mode; there is no dropout inside a layer.
    options = (b_ih is not None, 1, 0.0, torch.is_grad_enabled(), False, False)
    if cell is not None:
        states = [hidden.unsqueeze(0), cell.unsqueeze(0)]
        output, *last = aten.lstm.input(x, states, parameters, *options)
    else:
        output, *last = _FUSED[mode](x, hidden.unsqueeze(0), parameters, *options)
    return (output.flip(0) if reverse else output, *(state.squeeze(0) for state in last))


@torch.no_grad()
def recurrent_primal(*arguments: Any) -> tuple[Tensor, ...]:
    """``recurrent_layer`` of the linearized pass, whose primal needs no gradient."""
    return recurrent_layer(*arguments)


@REGISTRY.register
class RecurrentRule(Rule):
    """``recurrent_layer(mode, reverse, x, hidden, cell, w_ih, w_hh, b_ih, b_hh, w_hr)``."""

    name = "recurrent layer"
    targets = (recurrent_layer,)
    per_example_arguments = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
    differentiable_primal = False
    single_term = True

    def weight_axes(self, node: Node, position: int, rank: int) -> tuple[int, ...]:
        return (0,) if position in (5, 6, 9) else ()

    def placed_values(self, node: Node) -> list[Node]:
        """Of the results, only those that are used have a layout."""
        return [node.args[2], *node.users]  # type: ignore[list-item]

    def base(self, emit: Emitter, node: Node) -> Any:
        mask = self._mask(emit, node)
        return emit.copy(node) if mask is None else self._dropped(emit, node, (None,) * 5, mask)

    def _mask(self, emit: Emitter, node: Node) -> Any:
        """Mask of the hidden weights; None where no weight drop acts."""
        site = node.args[2]
        rate = emit.rate(site) if getattr(site, "target", None) is weight_drop_site else None  # type: ignore[arg-type]
        if rate is None:
            return None
        layout, name = self._row_layout(emit, node), emit.site_name(site)  # type: ignore[arg-type]
        return emit.call(hidden_mask, emit.value(node.args[6]), rate, layout, emit.draws, name)

    def _dropped(self, emit: Emitter, node: Node, changes: tuple[Any, ...], mask: Any) -> Any:
        mode, reverse, *states = node.args[:5]
        weights = tuple(emit.value(weight) for weight in node.args[5:])
        return emit.call(dropped_layer, mode, reverse, *map(emit.value, states), weights, changes, mask)

    def respond(self, emit: Emitter, node: Node) -> Any:
        changes = self._changes(emit, node, stacks_are_values=True)
        mask = self._mask(emit, node)
        if mask is not None:
            return self._dropped(emit, node, changes, mask)
        if not any(change is not None for change in changes):
            return emit.copy(node)
        mode, reverse, *states = node.args[:5]
        weights = tuple(emit.value(weight) for weight in node.args[5:])
        return emit.call(recurrent_response, mode, reverse, *map(emit.value, states), weights, changes)

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        mode, reverse, *states = node.args[:5]
        primals, tangents = tuple(map(emit.value, states)), tuple(map(emit.tangent, states))
        weights = tuple(emit.value(weight) for weight in node.args[5:])
        if any(emit.tangent(weight) is not None for weight in node.args[5:]):
            raise CaptureError(
                f"{emit.site_name(node)}: the weights of a recurrent network are computed from the examples, which has "
                f"no linearization here. Remedy: write that network as a loop over its cells (nn.LSTMCell)."
            )
        changes = self._changes(emit, node, stacks_are_values=False)
        mask = self._mask(emit, node)
        if mask is None:
            primal = emit.call(recurrent_primal, mode, reverse, *primals, *weights)
        else:
            primal = self._dropped(emit, node, (None,) * 5, mask)
        if not any(each is not None for each in (*changes, *tangents)):
            return primal, None
        if mask is None:
            arguments = (mode, reverse, primals, tangents, emit.item(primal, 0), weights, changes)
            tangent = emit.call(recurrent_tangent, *arguments)
        else:
            tangent = emit.call(dropped_tangent, mode, reverse, primals, tangents, weights, changes, mask)
        return primal, [emit.item(tangent, index) for index in range(3 if mode == "lstm" else 2)]

    def _changes(self, emit: Emitter, node: Node, stacks_are_values: bool) -> tuple[Any, ...]:
        """How each parameter differs per row of the layer's values, as ``recurrent_changes`` describes it."""
        return tuple(self._change(emit, node, parameter, stacks_are_values) for parameter in node.args[5:])

    def _change(self, emit: Emitter, node: Node, parameter: Any, stacks_are_values: bool) -> Any:
        changes, stack = emit.structured(parameter), emit.stack(parameter)
        if not changes and stack is None:
            return None
        layout = self._row_layout(emit, node)
        if changes:
            (structured,) = changes
            scales = emit.call(align, structured.scales, layout, 2)
            if structured.left is None:
                return ("row-wise", structured.factor, scales)
            return ("low-rank", structured.left, structured.factor, scales)
        if stacks_are_values:
            stack = emit.call(aten.sub.Tensor, stack, emit.value(parameter))
        change = emit.call(align, stack, layout, emit.rank(parameter) + 1)
        return change if emit.rank(parameter) == 1 else ("dense", change)

    def _row_layout(self, emit: Emitter, node: Node) -> Layout:
        """Layout of a value (N, ...) of one time step."""
        axis, outer, inner = emit.layout(node.args[2])  # type: ignore[arg-type]
        if axis != 1:
            raise BatchLayoutError(
                f"{emit.site_name(node)}: the batch lies along the time axis of a recurrent network. Remedy: check "
                f"batch_first of the network, or name the inputs' batch axis with batch_axis=."
            )
        return 0, outer, inner
