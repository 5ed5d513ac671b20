"""Augmentation modules of kornia in a model's own forward: those that are tuned become sites, others run as a whole.

A recognised one stands for the catalogue entry that does the same to each example: a flip with a probability, a
rotation by up to an angle, Gaussian noise. It becomes a site where a hyperparameter of that entry is asked for, in the
training graph; in evaluation mode the module does what it does. Others are captured, or run as themselves
(`opaque_leaves`), from the outermost augmentation down: the parts that draw their numbers refuse symbolic sizes.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from stn_fx.hparams import Selection
from stn_fx.rules.own_augmentations import augmentation_marker

_LIBRARY = "kornia.augmentation"


def whole_augmentation(model: nn.Module, name: str) -> str:
    """Name of the outermost augmentation that the module of this name is part of; else the name itself."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        outer = ".".join(parts[:end])
        if type(model.get_submodule(outer)).__module__.startswith(_LIBRARY):
            return outer
    return name


def tuned_augmentations(model: nn.Module, selections: Iterable[Selection]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Forwards, by the qualified name of a module, that bring the augmentations to be tuned into the training graph."""
    chosen = [selection for selection in selections if selection.entry.kind == "input"]
    forwards = {}
    for name, module in model.named_modules():
        found = recognised(module)
        if found is not None and any(s.entry.name == found[0] and s.matches(name) for s in chosen):
            forwards[name] = _marked(name, *found)
    return forwards


def recognised(module: nn.Module) -> tuple[str, float] | None:
    """(catalogue entry, its value here) of an augmentation that acts on each example for itself; None for others."""
    kind: Any = type(module)
    each = getattr(module, "p_batch", 0.0) == 1.0 and not getattr(module, "same_on_batch", True)
    if not kind.__module__.startswith(_LIBRARY) or not each:
        return None
    numbers: Any = getattr(module, "_param_generator", None)
    if kind.__name__ == "RandomHorizontalFlip":
        return "horizontal_flip", float(module.p)  # type: ignore[arg-type]
    if module.p != 1.0:  # no entry has a probability and a strength
        return None
    if kind.__name__ == "RandomRotation" and str(module.flags.get("resample")).endswith("BILINEAR"):  # type: ignore[operator, union-attr]
        low, high = numbers.degrees.flatten().tolist()
        return ("rotation", high) if low == -high else None
    if kind.__name__ == "RandomGaussianNoise" and numbers.mean == 0:
        return "gaussian_noise", float(numbers.std)
    return None


def _marked(name: str, entry: str, value: float) -> Callable[[Tensor], Tensor]:
    return lambda input: augmentation_marker(input, name, entry, value)
