"""Augmentation modules in a model's own forward, of kornia and of torchvision.transforms: those that are tuned become
sites, others run as a whole.

A recognised one stands for the catalogue entry that does the same to each example: a flip with a probability, a
rotation by up to an angle, Gaussian noise. It becomes a site where a hyperparameter of that entry is asked for, in the
training graph, drawn for each example (torchvision's own modules draw once for a batch); in evaluation mode the module
does what it does. Others are captured, or run as themselves (`opaque_leaves`), from the outermost augmentation down:
the parts that draw their numbers refuse symbolic sizes.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from stn_fx.errors import CaptureError
from stn_fx.hparams import Selection
from stn_fx.rules.own_augmentations import augmentation_marker

_LIBRARIES = ("kornia.augmentation", "torchvision.transforms")


def whole_augmentation(model: nn.Module, name: str) -> str:
    """Name of the outermost augmentation that the module of this name is part of; else the name itself."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        outer = ".".join(parts[:end])
        if type(model.get_submodule(outer)).__module__.startswith(_LIBRARIES):
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
    library = type(module).__module__
    if library.startswith("torchvision.transforms"):
        return _of_torchvision(module)
    return _of_kornia(module) if library.startswith("kornia.augmentation") else None


def _of_kornia(module: Any) -> tuple[str, float] | None:
    kind = type(module).__name__
    if getattr(module, "p_batch", 0.0) != 1.0 or getattr(module, "same_on_batch", True):
        return None
    if kind == "RandomHorizontalFlip":
        return "horizontal_flip", float(module.p)
    if module.p != 1.0:  # no entry has a probability and a strength
        return None
    numbers = getattr(module, "_param_generator", None)
    if kind == "RandomRotation" and str(module.flags.get("resample")).endswith("BILINEAR"):
        low, high = numbers.degrees.flatten().tolist()  # type: ignore[union-attr]
        return ("rotation", high) if low == -high else None
    if kind == "RandomGaussianNoise" and numbers.mean == 0:  # type: ignore[union-attr]
        return "gaussian_noise", float(numbers.std)  # type: ignore[union-attr]
    return None


def _of_torchvision(module: Any) -> tuple[str, float] | None:
    kind = type(module).__name__
    if kind == "RandomHorizontalFlip":
        return "horizontal_flip", float(module.p)
    if kind == "RandomRotation":
        low, high = module.degrees
        plain = not module.expand and module.center is None and module.fill in (0, None)
        fits = plain and low == -high and module.interpolation == InterpolationMode.BILINEAR
        return ("rotation", float(high)) if fits else None
    if kind == "GaussianNoise" and module.mean == 0 and not module.clip:
        return "gaussian_noise", float(module.sigma)
    return None


def _marked(name: str, entry: str, value: float) -> Callable[[Tensor], Tensor]:
    def forward(*inputs: Any) -> Tensor:
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise CaptureError(
                f"{name} is called with more than one image batch, and {entry} is tuned on one. Leave {entry} out of "
                f"hparams, or choose other places with a pattern."
            )
        return augmentation_marker(inputs[0], name, entry, value)

    return forward
