"""What a model, its example inputs and its outputs must be like, told before torch.export stumbles over it."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stn_fx.errors import CaptureError, InputError

_CONSTANTS = (int, float, bool, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)


def require_trainable(model: nn.Module) -> None:
    """A model without parameters, with frozen ones alone, with some that do not exist yet, or scripted, is refused."""
    kind = type(model).__name__
    parameters = dict(model.named_parameters())
    scripted = [
        name or "the model itself" for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)
    ]
    if scripted:
        raise CaptureError(
            f"{', '.join(scripted[:8])} of {kind} is a torch.jit.ScriptModule, which cannot be captured. Remedy: pass "
            f"the module that was scripted."
        )
    if any(hasattr(module, "_orig_mod") for module in model.modules()):
        raise InputError(
            f"{kind} holds a module that torch.compile has wrapped, whose graph cannot be taken apart. Remedy: pass "
            f"the model before torch.compile (its attribute _orig_mod)."
        )
    if not parameters:
        raise InputError(
            f"{kind} has no parameters, so there is nothing to train or to condition. Pass the model that is trained."
        )
    lazy = [name for name, p in parameters.items() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise InputError(f"{', '.join(lazy[:8])} of {kind} have no shape yet. Run the model once on a batch before.")
    if not any(p.requires_grad for p in parameters.values()):
        raise InputError(f"Every parameter of {kind} is frozen (requires_grad=False). Unfreeze those to be trained.")


def require_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Inputs are tensors, constants and nested containers of them, and hold at least one example."""
    leaves = pytree.tree_leaves_with_path((args, kwargs))
    named = [(f"example_inputs{_path(path[1:])}", leaf) for path, leaf in leaves]
    unknown = [f"{name} is a {type(leaf).__name__}" for name, leaf in named if not _is_known(leaf)]
    if unknown:
        raise InputError(
            f"Inputs are tensors, numbers, strings and containers of them, but {', '.join(unknown)}. Convert it, make "
            f"it a dataclass, or register its type with torch.utils._pytree.register_pytree_node."
        )
    tensors = [(name, leaf) for name, leaf in named if isinstance(leaf, Tensor)]
    if not any(leaf.ndim for _, leaf in tensors):
        raise InputError("The example inputs hold no tensor with a batch axis. Pass a batch as the model takes it.")
    empty = [name for name, leaf in tensors if not leaf.numel()]
    if empty:
        raise InputError(f"{', '.join(empty)} holds no elements. Pass a batch of examples.")


def require_output(model: nn.Module, output: Any) -> None:
    """Outputs are tensors in containers that can be taken apart, at least one of them floating."""
    named = pytree.tree_leaves_with_path(output)
    kind = type(model).__name__
    unknown = [f"{_path(path) or 'it'} is a {type(leaf).__name__}" for path, leaf in named if not _is_known(leaf)]
    if unknown:
        raise CaptureError(
            f"The output of {kind} cannot be taken apart: {', '.join(unknown)}. Remedy: return tensors in tuples, "
            f"lists, dicts or dataclasses, or register the type with torch.utils._pytree.register_pytree_node."
        )
    if not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for _, leaf in named):
        found = ", ".join(sorted({_described(leaf) for _, leaf in named})) or "nothing"
        raise CaptureError(
            f"The output of {kind} holds no floating tensor ({found}), so no loss can be computed from it. Remedy: "
            f"return the logits or predictions that the loss takes."
        )


def _is_known(leaf: Any) -> bool:
    # Dataclasses are registered when the model is captured.
    known = isinstance(leaf, (Tensor, *_CONSTANTS)) or leaf is Ellipsis or isinstance(leaf, torch.memory_format)
    return known or (dataclasses.is_dataclass(leaf) and not isinstance(leaf, type))


def _described(leaf: Any) -> str:
    return f"a tensor of {leaf.dtype}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"


def _path(path: tuple[Any, ...]) -> str:
    return "".join(str(key) for key in path)
