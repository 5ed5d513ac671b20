"""DropConnect on the hidden-to-hidden weights of recurrent layers, the weight drop of AWD-LSTM (Merity et al. 2017).

Each example has its own rate and its own mask, the same for all time steps. A mask of single weights has no structure
to compute with, so the masked weights are formed for every example, (N, G, P), and a layer with a site steps over time
instead of calling torch's fused operator; one without is as ever. Measured on one core (batch 20, 35 steps, one layer
of 128 and two of 200 cells): an update takes 21 and 25 ordinary ones, 3.4 without weight drop.
N rows, G = gates * H, P = H or the size of the projection.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from stn_fx.augment.draws import Draws
from stn_fx.augment.dropout import dropout_multiplier
from stn_fx.rules.layout import align
from stn_fx.rules.markers import marks
from stn_fx.rules.recurrent_changes import Change, add_changed_product, add_terms, changed_product
from stn_fx.rules.recurrent_response import Weights, gru_step, lstm_step
from stn_fx.rules.rule import REGISTRY, Emitter, Rule
from stn_fx.rules.tangent import linearize


@marks("weight_drop")
def weight_drop_site(x: Tensor) -> Tensor:
    """Marks the input (T, N, F) of a recurrent layer whose hidden weights are dropped; the input stays as it is."""
    return x


def hidden_mask(w_hh: Tensor, rate_B: Tensor, layout: Any, draws: Draws, name: str) -> Tensor:
    """Multiplier (N, G, P) of the hidden weights: 0 where dropped, else 1 / (1 - rate)."""
    rate = rate_B.to(w_hh.dtype)[:, None, None]
    return align(dropout_multiplier(w_hh, rate, draws, name, (len(rate_B), *w_hh.shape)), layout, 3)


def dropped_layer(
    mode: str,
    reverse: bool,
    x: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    weights: Weights,
    changes: tuple[Any, ...],
    mask: Tensor,
) -> tuple[Tensor, ...]:
    """As ``recurrent_response``, with the hidden weights ``mask * (w_hh + change)``."""
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    gates = add_changed_product(F.linear(x, w_ih, b_ih), x, changes[0])
    gates = gates if changes[2] is None else gates + changes[2]
    bias = b_hh if changes[3] is None else b_hh + changes[3]
    projection = None if w_hr is None else _plus(w_hr, _dense(changes[4])).expand(len(mask), *w_hr.shape)
    own = mask * _plus(w_hh, _dense(changes[1]))
    fixed, force = own.detach(), None
    if own.requires_grad or torch._C._functorch.peek_interpreter_stack() is not None:
        # The gradient of the weights, collected for all steps in one product: step by step it takes ten times as long.
        before = _before(mode, reverse, fixed, gates, hidden, cell, bias, projection)
        force = _all_steps(own - fixed, before)
    return _steps(mode, reverse, fixed, gates, hidden, cell, force, bias, projection)


def dropped_tangent(
    mode: str,
    reverse: bool,
    primals: tuple[Tensor, Tensor, Tensor | None],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    weights: Weights,
    changes: tuple[Any, ...],
    mask: Tensor,
) -> tuple[Tensor, ...]:
    """Tangents of ``dropped_layer`` along those of its input and states and along ``changes`` of its weights."""
    (x, hidden, cell), (x_t, hidden_t, cell_t) = primals, tangents
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    gates = F.linear(x, w_ih, b_ih)
    gates_t = add_terms(None if x_t is None else F.linear(x_t, w_ih), changed_product(x, changes[0]))
    gates_t = add_terms(gates_t, changes[2])
    change = _dense(changes[1])
    rows = len(mask)
    bias = None if b_hh is None else b_hh.expand(rows, -1)
    projection = None if w_hr is None else w_hr.expand(rows, *w_hr.shape)
    own = (mask * w_hh).detach()
    force_t = None
    if change is not None:
        force_t = _all_steps(mask * change, _before(mode, reverse, own, gates, hidden, cell, bias, projection))
    given = (gates, hidden, cell, None if force_t is None else torch.zeros_like(force_t), bias, projection)
    along = (
        None if gates_t is None else gates_t.expand_as(gates), hidden_t, cell_t, force_t, changes[3],
        _dense(changes[4]),
    )  # fmt: skip
    return linearize(lambda *values: _steps(mode, reverse, own, *values), given, along)  # type: ignore[arg-type]


def _steps(
    mode: str,
    reverse: bool,
    w_hh: Tensor,
    gates_x: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    force: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
) -> tuple[Tensor, ...]:
    """The recurrence with hidden weights (N, G, P) of each row.

    ``gates_x`` (T, N, G) is the input's part of the gates; ``force`` (T, N, G), in the order of the steps, is added to
    the hidden state's part.
    """
    outputs = []
    forces = [None] * len(gates_x) if force is None else force.unbind(0)
    for gates, more in zip((gates_x.flip(0) if reverse else gates_x).unbind(0), forces, strict=True):
        gates_h = add_terms(add_terms(_each(w_hh, hidden), more), b_hh)
        assert gates_h is not None
        if mode == "gru":
            hidden = gru_step(gates, gates_h, hidden)
        elif cell is None:
            hidden = (gates + gates_h).tanh() if mode == "tanh" else (gates + gates_h).relu()
        else:
            hidden, cell = lstm_step(gates + gates_h, cell)
            hidden = hidden if w_hr is None else _each(w_hr, hidden)
        outputs.append(hidden)
    output = torch.stack(outputs[::-1] if reverse else outputs)
    return (output, hidden) if cell is None else (output, hidden, cell)


@torch.no_grad()
def _before(
    mode: str,
    reverse: bool,
    w_hh: Tensor,
    gates_x: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
) -> Tensor:
    """Hidden states (T, N, P) that the steps begin with, in their order."""
    output = _steps(mode, reverse, w_hh, gates_x, hidden, cell, None, b_hh, w_hr)[0]
    return torch.cat([hidden.unsqueeze(0), (output.flip(0) if reverse else output)[:-1]])


def _all_steps(weights: Tensor, x: Tensor) -> Tensor:
    """``W_n x_n`` (T, N, O) for weights (N, O, I) and x (T, N, I)."""
    return torch.bmm(x.transpose(0, 1), weights.transpose(1, 2)).transpose(0, 1)


def _each(weights: Tensor, x: Tensor) -> Tensor:
    """``W_n x_n`` (N, O) for weights (N, O, I); as rows, which the CPU multiplies five times as fast as columns."""
    return torch.bmm(x.unsqueeze(1), weights.transpose(1, 2)).squeeze(1)


def _dense(change: Change) -> Tensor | None:
    """The change itself, (N, O, I)."""
    if change is None:
        return None
    kind, *parts = change
    if kind == "row-wise":
        factor, scales = parts
        return scales.unsqueeze(2) * factor
    if kind == "low-rank":
        left, factor, scales = parts
        return (left * scales.unsqueeze(1)) @ factor
    return parts[0]


def _plus(weight: Tensor, change: Tensor | None) -> Tensor:
    return weight if change is None else weight + change


@REGISTRY.register
class WeightDropRule(Rule):
    """A site of a recurrent layer, which reads the rate there; the value itself passes through."""

    name = "weight drop"
    targets = (weight_drop_site,)

    def is_site(self, node: Node) -> bool:
        """Inserted by the plan, so always a site."""
        return True

    def own_rate(self, node: Node) -> float:
        """There is no rate of the author's."""
        return 0.0

    def base(self, emit: Emitter, node: Node) -> Any:
        return emit.value(node.args[0])

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        return emit.value(node.args[0]), emit.tangent(node.args[0])
