"""Augmentation modules in a model's own forward, of kornia and of torchvision.transforms: those that are tuned become
sites, others run as a whole.

A recognised one stands for the catalogue entries that do the same to each example (`recognised_augmentations`). It
becomes a site of each where a hyperparameter of one of them is asked for, in the training graph, drawn for each example
(torchvision's own modules draw once for a batch); those of its entries that are not asked for act at its own values. In
evaluation mode the module does what it does. Others are captured, or run as themselves (`opaque_leaves`), from the
outermost augmentation down: the parts that draw their numbers refuse symbolic sizes.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from stn_fx.compiler.recognised_augmentations import LIBRARIES, Other, Recognised, recognised
from stn_fx.errors import CaptureError
from stn_fx.hparams import Selection
from stn_fx.rules.own_augmentations import augmentation_marker


def whole_augmentation(model: nn.Module, name: str) -> str:
    """Name of the outermost augmentation that the module of this name is part of; else the name itself."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        outer = ".".join(parts[:end])
        if type(model.get_submodule(outer)).__module__.startswith(LIBRARIES):
            return outer
    return name


def tuned_augmentations(model: nn.Module, selections: Iterable[Selection]) -> dict[str, Callable[..., Tensor]]:
    """Forwards, by the qualified name of a module, that bring the augmentations to be tuned into the training graph."""
    chosen = [selection for selection in selections if selection.entry.kind == "input"]
    forwards = {}
    for name, module in model.named_modules():
        found = recognised(module)
        if isinstance(found, Recognised) and _asked(name, found.entries, chosen):
            forwards[name] = _marked(name, found)
    return forwards


def left_augmentations(model: nn.Module, selections: Iterable[Selection]) -> Iterator[str]:
    """Why modules of the kind that was asked for are not tuned, for the report."""
    chosen = [selection for selection in selections if selection.entry.kind == "input"]
    for name, module in model.named_modules():
        found = recognised(module)
        asked = _asked(name, found.entries, chosen) if isinstance(found, Other) else []
        if isinstance(found, Other) and asked:
            kind = type(module).__name__
            yield f"{name} ({kind}) is no site of {', '.join(asked)} and stays as it is: {found.reason}"


def _asked(name: str, entries: Iterable[str], chosen: list[Selection]) -> list[str]:
    return [entry for entry in entries if any(s.entry.name == entry and s.matches(name) for s in chosen)]


def _marked(name: str, found: Recognised) -> Callable[..., Tensor]:
    def forward(*inputs: Any) -> Tensor:
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            entries = ", ".join(found.entries)
            raise CaptureError(
                f"{name} is called with more than one image batch, and {entries} is tuned on one. Leave {entries} out "
                f"of hparams, or choose other places with a pattern."
            )
        images = inputs[0]
        for entry, values in found.entries.items():
            images = augmentation_marker(images, name, entry, list(values), list(found.settings))
        return images

    return forward
