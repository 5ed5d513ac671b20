"""Tangent of a recurrent layer, and its adjoint: a linear recurrence along the trajectory of the primal.

The fused kernel has given the hidden states of all steps, so everything that does not run along time is computed for
all steps at once: the gates, their derivatives, and every term by which changed weights and inputs *force* the tangent
(``x DeltaW_ih^T + h_before DeltaW_hh^T + ...``).  What is left is linear in the tangents of the states,

    LSTM       p_t = K_t * (F_t + dh_{t-1} W_hh^T),  dc_t = f_t dc_{t-1} + p_t[i] + p_t[f] + p_t[g],
               dh_t = r_t dc_t + p_t[o]              (then projected: dh_t = E_t + dh_t W_hr^T)
    GRU, RNN   dh_t = D_t + z_t dh_{t-1} + sum over gates of K_t * (dh_{t-1} W_hh^T)

and its backward is the transposed recurrence, run backwards in time.  No operator's forward-mode or double-backward
rule is needed (the fused CPU and cuDNN kernels have none).
T steps, N rows, H cells, P = H or the size of the projection, G = gates * H.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stn_fx.rules.recurrent_changes import Change, add_changed_product, add_product, add_terms, changed_product
from stn_fx.rules.recurrent_response import Weights


def recurrent_tangent(
    mode: str,
    reverse: bool,
    primals: tuple[Tensor, Tensor, Tensor | None],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    output: Tensor,
    weights: Weights,
    changes: tuple[Any, ...],
) -> tuple[Tensor, ...]:
    """Tangents of (output, last hidden state, for an LSTM last cell state) of one layer in one direction.

    Args:
        mode: "lstm", "gru", "tanh" or "relu".
        reverse: whether the layer runs from the last step to the first.
        primals: input (T, N, F), initial hidden state (N, P) and cell state (N, H).
        tangents: theirs; None = zero.
        output: the primal output (T, N, P).
        weights: (w_ih, w_hh, b_ih, b_hh, w_hr) as torch documents them.
        changes: how each weight differs per row, see ``recurrent_changes``; (N, G) for a bias; None for neither.
    """
    x, hidden, cell = primals
    x_t, hidden_t, cell_t = tangents
    x_t = x_t if x_t is None else _in_order(x_t, reverse)
    x, output = _in_order(x, reverse), _in_order(output, reverse)
    w_ih, w_hh, b_ih, b_hh, _ = weights
    before = torch.cat([hidden.unsqueeze(0), output[:-1]])
    gates_x = F.linear(x, w_ih, b_ih)
    # Only in a GRU something stands between the hidden state's part of the gates and the input's.
    force_h = _force(changes[3], before, changes[1])
    force_x = _force(changes[2] if mode == "gru" else add_terms(changes[2], force_h), x, changes[0])
    if x_t is not None:
        force_x = F.linear(x_t, w_ih) if force_x is None else add_product(_filled(force_x, gates_x), x_t, w_ih)
    hidden_t = torch.zeros_like(hidden) if hidden_t is None else hidden_t
    last: list[Tensor] = []
    if cell is not None:
        cell_t = torch.zeros_like(cell) if cell_t is None else cell_t
        gates = add_product(gates_x if b_hh is None else gates_x + b_hh, before, w_hh)
        force, states_t = _filled(force_x, gates), (hidden_t, cell_t)
        output_t, *last = _lstm_tangent(gates, cell, force, states_t, weights, changes[4])
    else:
        if mode == "gru":
            gates_h = F.linear(before, w_hh, b_hh)
            constants, drive = _gru_coefficients(gates_x, gates_h, before, force_x, force_h)
        else:
            constants, drive = _rnn_coefficients(mode, output, force_x)
        (output_t,) = _Linear.apply(_SIMPLE, False, 1 + len(constants), w_hh, *constants, drive, hidden_t)
    return (output_t.flip(0) if reverse else output_t, output_t[-1], *last)


def _lstm_tangent(
    gates: Tensor, cell: Tensor, force: Tensor, states_t: tuple[Tensor, Tensor], weights: Weights, w_hr_change: Change
) -> tuple[Tensor, Tensor]:
    """Tangents of (output, last cell state)."""
    w_hh, w_hr = weights[1], weights[4]
    coefficients, unprojected = _lstm_coefficients(gates, cell)
    if w_hr is None:
        return _Linear.apply(_LSTM, False, 4, *coefficients, w_hh, force, *states_t)  # type: ignore[no-any-return]
    project_force = changed_product(unprojected, w_hr_change)
    if project_force is None:
        project_force = force.new_zeros(*force.shape[:2], w_hr.shape[0])
    return _Linear.apply(  # type: ignore[no-any-return]
        _LSTM, False, 5, *coefficients, w_hh, w_hr, force, project_force, *states_t
    )


def _in_order(steps: Tensor, reverse: bool) -> Tensor:
    """Steps (T, N, ...) in the order in which the layer takes them; contiguous, since products of views are slow."""
    return steps.flip(0) if reverse else steps.contiguous()


def _force(total: Tensor | None, x: Tensor, change: Change) -> Tensor | None:
    """``total + DeltaW_n x_n`` where None is zero."""
    return changed_product(x, change) if total is None else add_changed_product(total, x, change)


def _filled(force: Tensor | None, like: Tensor) -> Tensor:
    """The force for every step: biases alone come without the axis of time."""
    return torch.zeros_like(like) if force is None else force.expand_as(like)


# ---- derivatives along the trajectory, for all steps at once


def _lstm_coefficients(gates: Tensor, cell: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """((K (T, N, 4H), f (T, N, H), r (T, N, H)), hidden states before the projection (T, N, H))."""
    enter, forget, candidate, leave = gates.chunk(4, -1)
    enter, forget, leave, candidate = enter.sigmoid(), forget.sigmoid(), leave.sigmoid(), candidate.tanh()
    entered = enter * candidate
    cells = [cell]
    for kept, new in zip(forget.unbind(0), entered.unbind(0), strict=True):
        cells.append(torch.addcmul(new, kept, cells[-1]))
    before, after = torch.stack(cells[:-1]), torch.stack(cells[1:]).tanh()
    hidden = leave * after
    through_gates = torch.cat(
        [
            entered * (1 - enter),
            before * forget * (1 - forget),
            enter * (1 - candidate * candidate),
            hidden * (1 - leave),
        ],
        -1,
    )
    return (through_gates, forget, leave - hidden * after), hidden


def _gru_coefficients(
    gates_x: Tensor, gates_h: Tensor, before: Tensor, force_x: Tensor | None, force_h: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """((K (T, N, 3H), z (T, N, H)), D (T, N, H))."""
    (reset_x, update_x, new_x), (reset_h, update_h, new_h) = gates_x.chunk(3, -1), gates_h.chunk(3, -1)
    reset, update = (reset_x + reset_h).sigmoid(), (update_x + update_h).sigmoid()
    new = torch.addcmul(new_x, reset, new_h).tanh()
    to_new = (1 - update) * (1 - new * new)
    to_reset, to_update = to_new * new_h * reset * (1 - reset), (before - new) * update * (1 - update)
    through_h = torch.cat([to_reset, to_update, to_new * reset], -1)
    drive = add_terms(
        None if force_x is None else _sum_of_gates(torch.cat([to_reset, to_update, to_new], -1) * force_x, 3),
        None if force_h is None else _sum_of_gates(through_h * force_h, 3),
    )
    return (through_h, update), _filled(drive, before)


def _rnn_coefficients(mode: str, output: Tensor, force: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
    """((K (T, N, H),), D (T, N, H)); the derivatives of both activations follow from their values."""
    slope = 1 - output * output if mode == "tanh" else (output > 0).to(output.dtype)
    return (slope,), _filled(None if force is None else slope * force, output)


def _sum_of_gates(values: Tensor, gates: int) -> Tensor:
    return values.unflatten(-1, (gates, -1)).sum(-2)


# ---- the linear recurrences and their transposes


class _Linear(torch.autograd.Function):
    """A linear map of tensors, given together with its transpose: each is the other's backward.

    ``maps`` = (map, transpose); the first ``count`` tensors are constants of the map.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(maps: tuple[Callable[..., Any], ...], transposed: bool, count: int, *tensors: Tensor) -> Any:
        return maps[transposed](tensors[:count], *tensors[count:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.maps, ctx.transposed, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors[: ctx.count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        pulled = _Linear.apply(ctx.maps, not ctx.transposed, ctx.count, *ctx.saved_tensors, *cotangents)
        return (None, None, None, *(None,) * ctx.count, *pulled)


def _push_lstm(constants: tuple[Tensor, ...], force: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """(F, [E,] dh_0, dc_0) -> (dh (T, N, P), dc_T)."""
    through_gates, forget, through_cell, w_hh, *projection = constants
    *project_force, hidden, cell = rest
    from_hidden, size = w_hh.t(), cell.shape[-1]
    hiddens = []
    for t in range(force.shape[0]):
        change = torch.addmm(force[t], hidden, from_hidden) * through_gates[t]
        cell = torch.addcmul(_sum_of_gates(change[:, : 3 * size], 3), forget[t], cell)
        hidden = torch.addcmul(change[:, 3 * size :], through_cell[t], cell)
        if projection:
            hidden = torch.addmm(project_force[0][t], hidden, projection[0].t())
        hiddens.append(hidden)
    return torch.stack(hiddens), cell


def _pull_lstm(constants: tuple[Tensor, ...], output: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
    """Transpose of ``_push_lstm``: cotangents of (dh, dc_T) -> those of (F, [E,] dh_0, dc_0)."""
    through_gates, forget, through_cell, w_hh, *projection = constants
    hidden = torch.zeros_like(output[0])
    forces, project_forces = [], []
    for t in reversed(range(output.shape[0])):
        hidden = hidden + output[t]
        if projection:
            project_forces.append(hidden)
            hidden = hidden @ projection[0]
        cell = torch.addcmul(cell, through_cell[t], hidden)
        force = torch.cat([cell, cell, cell, hidden], -1) * through_gates[t]
        forces.append(force)
        hidden, cell = force @ w_hh, forget[t] * cell
    stacked = [torch.stack(found[::-1]) for found in (forces, project_forces) if found]
    return (*stacked, hidden, cell)


def _push_simple(constants: tuple[Tensor, ...], drive: Tensor, hidden: Tensor) -> tuple[Tensor]:
    """(D, dh_0) -> dh (T, N, H)."""
    w_hh, through_gates, *update = constants
    from_hidden, gates = w_hh.t(), w_hh.shape[0] // w_hh.shape[1]
    hiddens = []
    for t in range(drive.shape[0]):
        change = hidden @ from_hidden * through_gates[t]
        change = change if gates == 1 else _sum_of_gates(change, gates)
        kept = torch.addcmul(drive[t], update[0][t], hidden) if update else drive[t]
        hidden = kept + change
        hiddens.append(hidden)
    return (torch.stack(hiddens),)


def _pull_simple(constants: tuple[Tensor, ...], output: Tensor) -> tuple[Tensor, Tensor]:
    """Transpose of ``_push_simple``: the cotangent of dh -> those of (D, dh_0)."""
    w_hh, through_gates, *update = constants
    gates = w_hh.shape[0] // w_hh.shape[1]
    hidden = torch.zeros_like(output[0])
    drives = []
    for t in reversed(range(output.shape[0])):
        total = hidden + output[t]
        drives.append(total)
        change = total.repeat(1, gates) if gates > 1 else total
        hidden = change * through_gates[t] @ w_hh
        if update:
            hidden = torch.addcmul(hidden, update[0][t], total)
    return torch.stack(drives[::-1]), hidden


_LSTM = (_push_lstm, _pull_lstm)
_SIMPLE = (_push_simple, _pull_simple)
