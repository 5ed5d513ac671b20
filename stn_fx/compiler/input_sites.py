"""Which augmentations are inserted at which inputs, in which order.

By default an augmentation acts on the first input that it fits (an image where it needs one); with a pattern
(``cutout@pixel_values``) on every fitting input that the pattern selects. Those of one input act in the order of the
catalogue: geometry, blur, colour, noise, then what blanks parts of the image, so that no later one fills holes.
"""

import torch
from torch import Tensor
from torch.fx import Node

from stn_fx.augment.colour import check_channels
from stn_fx.augment.image_format import ImageFormat
from stn_fx.compiler.capture import CapturedGraph
from stn_fx.compiler.insertion import Insertion
from stn_fx.compiler.layouts import symbolic_axes
from stn_fx.errors import InputError
from stn_fx.hparams import CATALOGUE, Entry, Selection
from stn_fx.rules.custom import reference


def choose_input_sites(
    captured: CapturedGraph, selections: list[Selection], image_format: ImageFormat | None
) -> list[Insertion]:
    """Insertions for all selections of kind ``input``, in the order in which they are to be inserted. Pure.

    Raises:
        InputError: colour operations without an image format, or on images that have not the channels for them.
    """
    chosen = [selection for selection in selections if selection.entry.kind == "input"]
    # Each is inserted right behind the input, so what is inserted last acts first.
    chosen.sort(key=lambda selection: _position(selection.entry), reverse=True)
    _require_format([each.entry.name for each in chosen if each.entry.needs in ("pixels", "colour")], image_format)
    return [insertion for selection in chosen for insertion in _insertions(captured, selection, image_format)]


def _position(entry: Entry) -> int:
    """Place in the catalogue; those of the user's own come after all others."""
    return CATALOGUE.names.index(entry.name) if entry.name in CATALOGUE else len(CATALOGUE)


def _insertions(captured: CapturedGraph, selection: Selection, image_format: ImageFormat | None) -> list[Insertion]:
    entry = selection.entry
    inputs = [node for node in _fitting(captured, entry) if selection.matches(node.name)]
    if selection.pattern is None:
        inputs = inputs[:1]
    return [Insertion(entry.name, node.name, node, None, _arguments(entry, node, image_format)) for node in inputs]


def _fitting(captured: CapturedGraph, entry: Entry) -> list[Node]:
    placeholders = captured.placeholders()
    return [placeholders[name] for name in captured.inputs if _fits(placeholders[name], captured, entry)]


def _fits(node: Node, captured: CapturedGraph, entry: Entry) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return False
    batch_axes = symbolic_axes(value, captured.batch_symbol)
    if entry.needs == "tokens":
        whole = not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
        return whole and value.ndim >= 2 and bool(batch_axes)
    if entry.needs == "floating":
        return value.is_floating_point() and bool(batch_axes)
    return value.is_floating_point() and value.ndim == 4 and 0 in batch_axes


def _arguments(entry: Entry, node: Node, image_format: ImageFormat | None) -> tuple[object, ...]:
    """What the marker of this entry takes beside the input."""
    if entry.needs in ("pixels", "colour"):
        assert image_format is not None, "asked for before"
        channels = int(node.meta["val"].shape[1])
        check_channels(channels, [entry.name])
        image_format.check_channels(channels)
        return (entry.name, image_format.means, image_format.stds)
    if entry.apply is not None:
        return (reference(entry.apply), entry.per_batch)
    return (entry.name,) if entry.name in ("rotation", "translation", "scaling", "shear", "horizontal_flip") else ()


def _require_format(names: list[str], image_format: ImageFormat | None) -> None:
    if names and image_format is None:
        raise InputError(
            f"{', '.join(names)} {'acts' if len(names) == 1 else 'act'} on what pixels mean, and the numbers of an "
            f"image input may be anything. Say it with image_format=stn_fx.ImageFormat(mean, std), the normalisation "
            f"of your data, or --image-format on the command line; ImageFormat() is for images in [0, 1]."
        )
