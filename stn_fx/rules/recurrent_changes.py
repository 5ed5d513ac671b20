"""Products of a recurrent layer whose weights differ per example, without forming the weights.

A *change* of a weight W (O, I) is None or a tagged tuple, its per-example parts aligned to the N rows that the layer
works on (B examples, or B times what is folded into the batch):

    ("row-wise", U, s)       DeltaW_n = diag(s_n) U           U (O, I), s (N, O)
    ("low-rank", A, B, s)    DeltaW_n = A diag(s_n) B         A (O, r), B (r, I), s (N, r)
    ("dense", D)             DeltaW_n = D_n                   D (N, O, I), for a small parameter with an exact response
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Change = tuple[Any, ...] | None


def changed_product(x: Tensor, change: Change) -> Tensor | None:
    """``DeltaW_n x_n`` for x (..., N, I): (..., N, O); None where the weight does not change."""
    if change is None:
        return None
    kind, *parts = change
    if kind == "row-wise":
        factor, scales = parts
        return F.linear(x, factor) * scales
    if kind == "low-rank":
        left, factor, scales = parts
        return F.linear(F.linear(x, factor) * scales, left)
    return torch.einsum("noi,...ni->...no", parts[0], x)


def add_changed_product(total: Tensor, x: Tensor, change: Change) -> Tensor:
    """``total + DeltaW_n x_n``, where the response is row-wise in one sweep over memory."""
    if change is not None and change[0] == "row-wise":
        _, factor, scales = change
        return torch.addcmul(total, F.linear(x, factor), scales)
    product = changed_product(x, change)
    return total if product is None else total + product


def add_product(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``total + x W^T`` for total (T, N, O) in one sweep over memory."""
    return torch.addmm(total.flatten(0, 1), x.flatten(0, 1), weight.t()).view(total.shape)


def add_terms(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """``left + right`` where None is zero."""
    if left is None or right is None:
        return right if left is None else left
    return left + right
