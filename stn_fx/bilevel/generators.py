"""The state of every generator that a run may draw from, as plain data, and back.

Found without a word from the user: torch's global generators (CPU and all CUDA devices), Python's and NumPy's global
ones, those of the wrapped model, and every generator that the loaders hold in an attribute, at any depth (that of the
loader, its sampler, its data set, its transforms).
"""

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule

State = dict[str, Any]

MAX_DEPTH = 6
"""Attributes of attributes that are looked into: transforms of a data set of a subset of a loader is five."""
MAX_MEMBERS = 32


class Generators:
    """All generators of one run.

    Args:
        stn: the wrapped model.
        loaders: by the name under which their generators are stored.
    """

    def __init__(self, stn: "SelfTuningModule", loaders: Mapping[str, Any]) -> None:
        self.stn = stn
        self.loaders = loaders

    def state(self) -> State:
        """Tensors, numbers, strings, lists and dicts; a copy."""
        numpy = sys.modules.get("numpy")
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "python": random.getstate(),
            "numpy": _numpy_state(numpy.random.get_state(legacy=False)) if numpy else None,
            "stn": self.stn.generator().get_state(),
            "mixing": self.stn.generator("cpu").get_state(),
            "loaders": {
                name: {path: _get(generator) for path, generator in generators_in(loader)}
                for name, loader in self.loaders.items()
            },
        }

    def restore(self, state: State) -> None:
        """Set every generator to a state that `state()` gave."""
        torch.set_rng_state(state["torch"])
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])
        random.setstate(state["python"])
        if state["numpy"] is not None:
            import numpy

            numpy.random.set_state(_numpy_arrays(state["numpy"]))
        self.stn.generator("cpu").set_state(state["mixing"])
        self.stn.generator().set_state(state["stn"])
        for name, loader in self.loaders.items():
            saved = state["loaders"][name]
            for path, generator in generators_in(loader):
                if path in saved:
                    _set(generator, saved[path])

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Whatever is drawn meanwhile, all generators are as before afterwards."""
        before = self.state()
        try:
            yield
        finally:
            self.restore(before)


def default_generators(device: torch.device) -> list[torch.Generator]:
    """Torch's global generators that a model on this device may draw from."""
    found = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        found.append(torch.cuda.default_generators[index])
    return found


def generators_in(holder: Any) -> Iterator[tuple[str, Any]]:
    """Every generator in the attributes of an object, with the path that leads to it; each once."""
    seen: set[int] = set()

    def walk(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
        if id(value) in seen or depth > MAX_DEPTH:
            return
        seen.add(id(value))
        if _is_generator(value):
            yield path, value
            return
        for name, part in _parts(value):
            yield from walk(part, f"{path}.{name}" if path else name, depth + 1)

    yield from walk(holder, "", 0)


def _parts(value: Any) -> list[tuple[str, Any]]:
    """What to look into: attributes, and members of short containers (a list of transforms, not one of examples)."""
    if isinstance(value, (list, tuple)):
        return [(str(i), part) for i, part in enumerate(value)] if len(value) <= MAX_MEMBERS else []
    if isinstance(value, dict):
        return [(str(key), part) for key, part in value.items()] if len(value) <= MAX_MEMBERS else []
    if isinstance(value, (Tensor, type, ModuleType)):
        return []
    return list(vars(value).items()) if hasattr(value, "__dict__") else []


def _is_generator(value: Any) -> bool:
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))


def _get(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return _numpy_state(generator.bit_generator.state)
    return _numpy_state(generator.get_state(legacy=False))


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = _numpy_arrays(state)
    else:
        generator.set_state(_numpy_arrays(state))


def _numpy_state(state: Any) -> Any:
    """NumPy's state with arrays as {"array": list, "dtype": name}, so that it is plain data."""
    if isinstance(state, dict):
        return {key: _numpy_state(value) for key, value in state.items()}
    return {"array": state.tolist(), "dtype": str(state.dtype)} if hasattr(state, "tolist") else state


def _numpy_arrays(state: Any) -> Any:
    import numpy

    if not isinstance(state, dict):
        return state
    if set(state) == {"array", "dtype"}:
        return numpy.array(state["array"], dtype=state["dtype"])
    return {key: _numpy_arrays(value) for key, value in state.items()}
