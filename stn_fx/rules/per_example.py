"""Any operator on values that differ per example: the general way, for operators without a faster one of their own.

Every tensor argument is given a *mode*: ``"stack"`` (already one value per example, batch in front), a layout tuple
(a packed activation, unpacked into its stack) or ``"shared"`` (the same for every example).  The operator then runs
under ``torch.vmap`` on unit values, with the sizes that it would have at B = 1, and the result is packed again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from stn_fx.rules.layout import pack, unpack
from stn_fx.rules.tangent import linearize

Mode = str | tuple[int, int, int]


def per_example(operator: Callable[..., Any], arguments: Any, options: Any, modes: Sequence[Mode], out: Any) -> Any:
    """``operator(*arguments, **options)`` for every example; ``out`` is a layout, or "stack", or a list of them.

    ``modes`` has one entry for each tensor in (arguments, options), in flattening order.
    """
    leaves, spec = tree_flatten((arguments, options))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    stacks = [
        unpack(leaves[i], mode) if isinstance(mode, tuple) else leaves[i] for i, mode in zip(where, modes, strict=True)
    ]

    def unit(*values: Tensor) -> Any:
        filled = list(leaves)
        for index, value in zip(where, values, strict=True):
            filled[index] = value
        positional, keywords = tree_unflatten(filled, spec)
        return operator(*positional, **keywords)

    in_dims = tuple(None if mode == "shared" else 0 for mode in modes)
    result = torch.vmap(unit, in_dims)(*stacks)
    if isinstance(result, (tuple, list)):
        return [_packed(item, mode) for item, mode in zip(result, out, strict=True)]
    return _packed(result, out)


def per_example_tangent(
    operator: Callable[..., Any],
    arguments: Any,
    options: Any,
    modes: Sequence[Mode],
    tangents: Sequence[Tensor | None],
    out: Any,
) -> Any:
    """Tangent of :func:`per_example`.

    A "stack" tangent belongs to a parameter whose primal is shared by all examples.
    """
    leaves, spec = tree_flatten((arguments, options))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    primals = []
    for index, mode, tangent in zip(where, modes, tangents, strict=True):
        leaf = leaves[index].detach()
        if mode == "stack" and tangent is not None:
            leaf = leaf.unsqueeze(0).expand(tangent.shape[0], *leaf.shape)
        primals.append(leaf)

    def on_tensors(*values: Tensor) -> Any:
        filled = list(leaves)
        for index, value in zip(where, values, strict=True):
            filled[index] = value
        positional, keywords = tree_unflatten(filled, spec)
        result = per_example(operator, positional, keywords, modes, out)
        return tuple(result) if isinstance(result, list) else result

    return linearize(on_tensors, tuple(primals), tuple(tangents))


def _packed(value: Any, mode: Any) -> Any:
    return pack(value, mode) if isinstance(mode, tuple) and isinstance(value, Tensor) else value
