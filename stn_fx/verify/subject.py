"""What is checked: a copy of the wrapped model in float64, in which nothing is constant by accident.

Layer scales of 1e-6 and gammas of zero hide whole blocks from every comparison, and a fresh response is zero, so the
copy's constant parameters are drawn at random.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stn_fx.errors import InputError

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def independent_copy(stn: "SelfTuningModule") -> "SelfTuningModule":
    """Deep copy that shares nothing with the user's module; its graphs are captured anew when they are needed."""
    # Attributes that are computed (weight_norm's weight) have a history, which deepcopy refuses.
    computed = {
        id(value): value.detach().clone()
        for module in stn.model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(stn, dict(computed))


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs with their floating tensors detached and in ``dtype``."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        return value.to(dtype) if value.is_floating_point() else value

    return pytree.tree_map(leaf, inputs)


def split_inputs(inputs: Any) -> Inputs:
    """(positional, keyword) inputs from a tensor, a tuple of positional or a dict of keyword inputs."""
    if isinstance(inputs, dict):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    raise InputError(f"check needs a batch: a tensor, a tuple or a dict of inputs, not a {type(inputs).__name__}.")


def same_draws() -> None:
    """Begin every run with the same random numbers: some models draw their own (augmentations, noise)."""
    torch.manual_seed(0)


def randomise_constants(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter whose entries are all equal, and every running statistic, at random."""

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    with torch.no_grad():
        for parameter in model.parameters():
            if (
                parameter.is_floating_point()
                and parameter.numel()
                and bool((parameter == parameter.flatten()[0]).all())
            ):
                centre = 1.0 if parameter.flatten()[0] == 1 else 0.0
                parameter.copy_(centre + 0.3 * normal(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * normal(buffer))
            elif name.endswith("running_var"):
                buffer.mul_((0.3 * normal(buffer)).exp())


def randomise_response(stn: "SelfTuningModule", generator: torch.Generator) -> None:
    """Draw the response parameters that are zero, as all ``V`` and ``G`` are before training."""
    with torch.no_grad():
        for parameter in stn.response_parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def rows_of(tree: Any, axes: list[int | None], rows: list[int]) -> Any:
    """The examples ``rows`` of nested inputs, whose flattened tensors have the batch at ``axes``."""
    flat, spec = pytree.tree_flatten(tree)
    picked = [
        value if axis is None else value.index_select(axis, torch.tensor(rows, device=value.device))
        for value, axis in zip(flat, axes, strict=True)
    ]
    return pytree.tree_unflatten(picked, spec)


def unshared(inputs: Inputs) -> Inputs:
    """Copies of all tensors: a forward may write into its inputs, which are needed again."""
    return pytree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, inputs)
