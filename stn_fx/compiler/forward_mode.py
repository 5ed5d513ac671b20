"""Which operators have no forward mode: their tangents go through central differences, and the report says so.

Operators outside of torch's own must not be asked: forward mode gives a silent zero for a ``torch.library.custom_op``.
"""

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from stn_fx.compiler.trial_values import trial_arguments
from stn_fx.rules import Registry
from stn_fx.rules.tangent import differentiable, load_forward_mode

_REFUSAL = "forward AD"


def lacks_forward_mode(node: Node, registry: Registry) -> bool:
    """Whether this call has neither a rule nor a forward mode of its own."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if registry.find(node) is not None:
        return False
    if "lacks_forward_mode" not in node.meta:
        node.meta["lacks_forward_mode"] = is_foreign(node) or _is_refused(node)
    return bool(node.meta["lacks_forward_mode"])


def is_foreign(node: Node) -> bool:
    """Whether this calls an operator that neither torch nor stn_fx defines."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "stn_fx")


def _is_refused(node: Node) -> bool:
    """Ask torch on fake values."""
    mode, *arguments = trial_arguments(node)
    leaves, spec = pytree.tree_flatten(tuple(arguments))
    floating = [i for i, leaf in enumerate(leaves) if differentiable(leaf)]
    if not floating:
        return False

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for index, value in zip(floating, values, strict=True):
            filled[index] = value
        args, kwargs = pytree.tree_unflatten(filled, spec)
        outputs = node.target(*args, **kwargs)  # type: ignore[operator]
        return tuple(o for o in pytree.tree_leaves(outputs) if differentiable(o))

    with mode:
        primals = tuple(leaves[i].detach() for i in floating)
    load_forward_mode()
    try:
        with mode:
            torch.func.jvp(function, primals, tuple(torch.empty_like(p) for p in primals))
    except NotImplementedError as error:
        return _REFUSAL in str(error)
    except Exception:  # not a matter of forward mode
        return False
    return False
