"""The recurrence with weights that differ per example: one step after the other.

Input weights act on all time steps at once; what is left for each step is the hidden state's product, its response
terms, and the gates.  T steps, N rows, F input features, H cells, P = H or the size of the projection.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stn_fx.rules.recurrent_changes import add_changed_product

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def recurrent_response(
    mode: str, reverse: bool, x: Tensor, hidden: Tensor, cell: Tensor | None, weights: Weights, changes: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """One layer in one direction: (output (T, N, P), last hidden state (N, P), for an LSTM last cell state (N, H)).

    ``weights`` are (w_ih, w_hh, b_ih, b_hh, w_hr) as torch documents them, ``changes`` how each differs per row: a
    change as in ``recurrent_changes`` for a weight, (N, G) for a bias, None for neither.
    """
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    w_ih_change, w_hh_change, b_ih_change, b_hh_change, w_hr_change = changes
    x = x.flip(0) if reverse else x.contiguous()
    gates_x = add_changed_product(F.linear(x, w_ih, b_ih), x, w_ih_change)
    gates_x = gates_x if b_ih_change is None else gates_x + b_ih_change
    bias_h = b_hh if b_hh_change is None else b_hh + b_hh_change
    if mode != "gru" and bias_h is not None:  # only a GRU's reset gate stands between the two biases
        gates_x, bias_h = gates_x + bias_h, None
    outputs = []
    for gates in gates_x.unbind(0):
        if mode == "gru":
            gates_h = add_changed_product(_affine(hidden, w_hh, bias_h), hidden, w_hh_change)
            hidden = gru_step(gates, gates_h, hidden)
        else:
            gates = add_changed_product(torch.addmm(gates, hidden, w_hh.t()), hidden, w_hh_change)
            if cell is None:
                hidden = gates.tanh() if mode == "tanh" else gates.relu()
            else:
                hidden, cell = lstm_step(gates, cell)
                if w_hr is not None:
                    hidden = add_changed_product(F.linear(hidden, w_hr), hidden, w_hr_change)
        outputs.append(hidden)
    output = torch.stack(outputs[::-1] if reverse else outputs)
    return (output, hidden) if cell is None else (output, hidden, cell)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight) if bias is None else torch.addmm(bias, x, weight.t())


def gru_step(gates_x: Tensor, gates_h: Tensor, hidden: Tensor) -> Tensor:
    """Next hidden state of a GRU from the gates of input and hidden state."""
    (reset_x, update_x, new_x), (reset_h, update_h, new_h) = gates_x.chunk(3, -1), gates_h.chunk(3, -1)
    new = torch.addcmul(new_x, torch.sigmoid(reset_x + reset_h), new_h).tanh()
    return torch.lerp(new, hidden, torch.sigmoid(update_x + update_h))


def lstm_step(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Next hidden and cell state of an LSTM."""
    enter, forget, candidate, leave = gates.chunk(4, -1)
    cell = torch.addcmul(forget.sigmoid() * cell, enter.sigmoid(), candidate.tanh())
    return leave.sigmoid() * cell.tanh(), cell
