"""A recurrent network is captured as one marker operator: torch.export would walk through all of its time steps.

Torch's own decomposition costs seconds for every hundred steps and fixes the batch size where it is traced again.  The
marker stands in the captured graph until ``recurrent_networks`` spells it out; packed sequences are refused.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stn_fx.errors import CaptureError

aten = torch.ops.aten

PACKED_REMEDY = (
    "Packed sequences (pack_padded_sequence) cannot be captured with a dynamic batch, because their shape depends on "
    "the lengths. Remedy: run the recurrent network on the padded batch and use the lengths afterwards: take the last "
    "valid step with output.gather, and leave padded steps out of the loss; the forward direction gives the same "
    "values there. A backward direction would see the padding first: flip each sequence within its own length."
)

FUSED = {
    "lstm": aten.lstm.input,
    "gru": aten.gru.input,
    "rnn_tanh": aten.rnn_tanh.input,
    "rnn_relu": aten.rnn_relu.input,
}
"""Torch's fused operators over all layers and directions, by their names."""


@torch.library.custom_op("stn_fx::recurrent_network", mutates_args=())
def recurrent_network(
    kind: str,
    x: Tensor,
    states: list[Tensor],
    parameters: list[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    """Stands for a whole network, arguments as torch's fused operators have them; (output, last states...)."""
    given = states if kind == "lstm" else states[0]
    options = (has_biases, layers, dropout, training, bidirectional, batch_first)
    return list(FUSED[kind](x, given, parameters, *options))


@recurrent_network.register_fake
def _(
    kind: str,
    x: Tensor,
    states: list[Tensor],
    parameters: list[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    return [x.new_empty((*x.shape[:2], width)), *(torch.empty_like(state) for state in states)]


@contextlib.contextmanager
def recurrent_markers() -> Iterator[None]:
    """``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` call the marker while this is open."""
    networks: Any = torch.nn.modules.rnn
    own = networks._VF
    networks._VF = _Markers()
    try:
        yield
    finally:
        networks._VF = own


def packs_sequences(error: BaseException) -> bool:
    """Whether capture failed in the making or in the use of packed sequences."""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        in_network = frame.f_globals.get("__name__") == "torch.nn.modules.rnn"
        if frame.f_code.co_name == "pack_padded_sequence":
            return True
        if in_network and frame.f_locals.get("batch_sizes") is not None:
            return True
        trace = trace.tb_next
    return False


class _Markers:
    """The part of ``torch._VF`` that recurrent modules call, with markers for the networks."""

    def __getattr__(self, name: str) -> Any:
        if name not in FUSED:
            return getattr(torch._VF, name)

        def mark(x: Tensor, states: Any, parameters: Any, has_biases: Any, *options: Any) -> Any:
            if not isinstance(has_biases, bool):  # the form with batch sizes, which is for packed sequences
                raise CaptureError(PACKED_REMEDY)
            given = [states] if isinstance(states, Tensor) else list(states)
            return tuple(recurrent_network(name, x, given, list(parameters), has_biases, *options))

        return mark
