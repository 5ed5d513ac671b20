"""The user's module, the global generators and torch's switches as they were, whatever happens in between."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Modes, attributes, global generators and the attention fast path as before, whatever happens inside.

    Attributes too: some models cache tensors in forward, and a cached tensor of the tracer would stay in the model.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with attributes_as_found(model), torch.random.fork_rng(devices=[d for d in devices if d is not None]):
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextlib.contextmanager
def attributes_as_found(model: nn.Module) -> Iterator[None]:
    """Attributes of all modules as before: modes, parameters, hooks, counters, caches."""
    attributes = {module: _copied_attributes(module) for module in model.modules()}
    try:
        yield
    finally:
        for module, (values, contents) in attributes.items():
            module.__dict__.clear()
            module.__dict__.update(values)
            for container, content in contents:
                container.clear()
                container.update(content)


@contextlib.contextmanager
def buffers_as_found(model: nn.Module) -> Iterator[None]:
    """Values of the buffers as before: some models count or collect in evaluation mode too."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers and not torch.equal(buffer, buffers[name]):
                    buffer.copy_(buffers[name])


def _copied_attributes(module: nn.Module) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """The module's attributes, and the contents of its dicts and sets (parameters, buffers, hooks, own caches)."""
    values = dict(module.__dict__)
    return values, [(value, value.copy()) for value in values.values() if isinstance(value, (dict, set))]
