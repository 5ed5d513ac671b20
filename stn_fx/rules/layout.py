"""Where the batch lies in a tensor, and how values that differ per example are brought to it.

A tensor that carries the batch has one axis of size ``outer * B * inner``: a plain batch axis has outer = inner = 1,
Swin's windows ``(B*9, 49, C)`` are batch-major (outer = 1, inner = 9), the output projection of
``nn.MultiheadAttention`` works on ``(17*B, E)``, batch-minor (outer = 17, inner = 1).  The *unit* value of a tensor is
what it would be at B = 1; a *stack* is the tensor of all unit values, shape (B, *unit).  Every layout is then a
bijection between the packed tensor and the stack, and that is all the rules need.

Layouts travel through emitted code as plain tuples ``(axis, outer, inner)``.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class BatchLayout(NamedTuple):
    """Position of the batch in a tensor: ``shape[axis] == outer * B * inner``, the example index in the middle."""

    axis: int
    outer: int = 1
    inner: int = 1

    @property
    def folded(self) -> bool:
        """Whether the batch shares its axis with something else."""
        return self.outer * self.inner != 1

    def __str__(self) -> str:
        if not self.folded:
            return f"axis {self.axis}"
        parts = [str(n) for n in (self.outer,) if n != 1] + ["B"] + [str(n) for n in (self.inner,) if n != 1]
        kind = "batch-major" if self.outer == 1 else "batch-minor" if self.inner == 1 else "batch in the middle"
        return f"axis {self.axis} = {'*'.join(parts)} ({kind})"


def unpack(packed: Tensor, layout: tuple[int, int, int]) -> Tensor:
    """Packed tensor -> stack (B, *unit); the inverse of :func:`pack`."""
    axis, outer, inner = layout
    if outer * inner == 1:
        return packed.movedim(axis, 0).unsqueeze(axis + 1)
    shape = packed.shape
    split = packed.reshape(*shape[:axis], outer, shape[axis] // (outer * inner), inner, *shape[axis + 1 :])
    return split.movedim(axis + 1, 0).flatten(axis + 1, axis + 2)


def pack(stack: Tensor, layout: tuple[int, int, int]) -> Tensor:
    """Stack (B, *unit) -> packed tensor."""
    axis, outer, inner = layout
    if outer * inner == 1:
        return stack.squeeze(axis + 1).movedim(0, axis)
    split = stack.unflatten(axis + 1, (outer, inner)).movedim(0, axis + 1)
    return split.flatten(axis, axis + 2)


def align(stack: Tensor, layout: tuple[int, int, int], ndim: int) -> Tensor:
    """Stack (B, *unit) -> a tensor of ``ndim`` axes that broadcasts against packed tensors of this layout.

    The unit shape is matched from the right, as in broadcasting; its entry at the batch axis is 1 or outer * inner.
    """
    axis, outer, inner = layout
    missing = ndim - (stack.ndim - 1)
    full = stack.reshape(stack.shape[0], *(1,) * missing, *stack.shape[1:]) if missing else stack
    if outer * inner == 1:
        return full.squeeze(axis + 1).movedim(0, axis)
    if full.shape[axis + 1] == 1:
        full = full.expand(*full.shape[: axis + 1], outer * inner, *full.shape[axis + 2 :])
    return pack(full, layout)


def split_batch(packed: Tensor, layout: tuple[int, int, int]) -> Tensor:
    """View a folded axis as three, (outer, B, inner), so that values per example broadcast without being copied."""
    axis, outer, inner = layout
    if outer * inner == 1:
        return packed
    return packed.unflatten(axis, (outer, packed.shape[axis] // (outer * inner), inner))


def join_batch(split: Tensor, layout: tuple[int, int, int]) -> Tensor:
    """Inverse of :func:`split_batch`."""
    axis, outer, inner = layout
    return split if outer * inner == 1 else split.flatten(axis, axis + 2)


def per_row(scales_BO: Tensor, layout: tuple[int, int, int], ndim: int, channel_axis: int) -> Tensor:
    """Row scales (B, O) shaped to broadcast against ``split_batch`` of a packed tensor with O channels."""
    axis, outer, inner = layout
    channel_axis %= ndim
    batch_at, channel_at = axis, channel_axis
    if outer * inner != 1:
        ndim, batch_at = ndim + 2, axis + 1
        channel_at = channel_axis + 2 if channel_axis > axis else channel_axis
    shape = [1] * ndim
    shape[batch_at], shape[channel_at] = scales_BO.shape
    return (scales_BO if batch_at < channel_at else scales_BO.t()).reshape(shape)


def scale_rows(values: Tensor, scales_BO: Tensor, layout: tuple[int, int, int], channel_axis: int) -> Tensor:
    """``values`` with each channel of each example scaled by its entry of ``scales_BO`` (B, O)."""
    split = split_batch(values, layout)
    return join_batch(split * per_row(scales_BO, layout, values.ndim, channel_axis), layout)


def scale_inputs(values: Tensor, scales_BO: Tensor, layout: tuple[int, int, int], channel_axis: int) -> Tensor:
    """`scale_rows` in the precision of the values, which under autocast is that of the product that they enter."""
    return scale_rows(values, scales_BO.to(values.dtype), layout, channel_axis)


def add_scaled_rows(
    total: Tensor, values: Tensor, scales_BO: Tensor, layout: tuple[int, int, int], channel_axis: int
) -> Tensor:
    """``total + scale_rows(values, scales)`` in one sweep over memory."""
    scales = per_row(scales_BO, layout, values.ndim, channel_axis)
    return join_batch(torch.addcmul(split_batch(total, layout), split_batch(values, layout), scales), layout)
