"""Autocast made explicit: the casts that it does become nodes, and the graph then runs with autocast switched off.

So a graph does the same whatever surrounds it: regions that the user's forward opens or closes keep their precision,
and the backward of a tangent, which runs outside of the region, works in the dtypes of its forward.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from stn_fx.compiler.functionalize import written_argument
from stn_fx.compiler.trial_values import trial_arguments

aten = torch.ops.aten


def device_type(model: nn.Module) -> str:
    """Type of the device that the model is on."""
    return next((p.device.type for p in model.parameters()), "cpu")


def ambient_autocast(model: nn.Module) -> torch.dtype | None:
    """The dtype of the autocast that surrounds the call; None where there is none."""
    device = device_type(model)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@contextlib.contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Autocast switched off, for graphs whose casts are explicit."""
    if ambient_autocast(model) is None:
        yield
        return
    with torch.autocast(device_type(model), enabled=False):
        yield


def cast_explicitly(graph: Graph, model: nn.Module) -> None:
    """Insert the casts that autocast did while ``graph`` was captured, in place.

    The captured dtypes tell where: an operator that gives another one by itself, or refuses its inputs, had them cast.
    """
    device = device_type(model)
    for node in list(graph.nodes):
        captured = _floating_dtype(node.meta.get("val")) if node.op == "call_function" else None
        if captured is None or not isinstance(node.target, torch._ops.OpOverload) or written_argument(node) is not None:
            continue
        if _own_dtype(node, device) == captured:
            continue
        for source in node.all_input_nodes:
            if _floating_dtype(source.meta.get("val")) in (None, captured):
                continue
            with graph.inserting_before(node):
                cast = graph.call_function(aten.to.dtype, (source, captured))
            cast.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
            cast.meta["val"] = source.meta["val"].to(captured)
            node.replace_input_with(source, cast)


def _own_dtype(node: Node, device: str) -> torch.dtype | None:
    """Dtype that the operator gives without autocast; None where it refuses its inputs."""
    mode, args, kwargs = trial_arguments(node)
    with mode, torch.autocast(device, enabled=False):
        try:
            return _floating_dtype(node.target(*args, **kwargs))  # type: ignore[operator]
        except (RuntimeError, TypeError, ValueError):
            return None


def _floating_dtype(value: Any) -> torch.dtype | None:
    if isinstance(value, (tuple, list)):
        value = next((item for item in value if _floating_dtype(item) is not None), None)
    return value.dtype if isinstance(value, Tensor) and value.is_floating_point() else None
