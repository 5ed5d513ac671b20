"""What one model offers of the catalogue: for each entry the places that it can act at, or why it cannot."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from stn_fx.augment.image_format import ImageFormat
from stn_fx.compiler.capture import CapturedGraph
from stn_fx.compiler.input_sites import choose_input_sites
from stn_fx.compiler.pipeline import BatchAxis, capture_with_batch_axis
from stn_fx.compiler.sites import FoundSite, choose_insertions, find_sites
from stn_fx.errors import InputError
from stn_fx.hparams import CATALOGUE, Catalogue, Entry, Selection
from stn_fx.rules import load_builtin_rules

WHERE = {
    "loss": "the training loss",
    "mixing": "examples and targets of each batch",
    "activation": "the training loss, on the output of a module that you name with @",
}


@dataclass(frozen=True)
class Offer:
    """One entry of the catalogue for one model.

    Attributes:
        entry: the entry.
        places: qualified names of sites (the model's own, or where one would be inserted) or names of inputs.
        where: in words, for entries that act at no place.
        reason: why it cannot be used with this model; empty where it can.
    """

    entry: Entry
    places: tuple[str, ...] = ()
    where: str = ""
    reason: str = ""


def offers(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    batch_axis: BatchAxis = None,
    image_format: ImageFormat | None = None,
    catalogue: Catalogue = CATALOGUE,
) -> list[Offer]:
    """Every entry of the catalogue with its places in this model; nothing of the model is changed.

    Raises:
        CaptureError, BatchLayoutError: as `stn_fx.transform` does.
    """
    keywords = isinstance(example_inputs, Mapping)
    args = () if keywords else tuple(example_inputs)
    captured, _ = capture_with_batch_axis(model, args, dict(example_inputs) if keywords else {}, batch_axis)
    graph = captured.training
    found = find_sites(graph, model, load_builtin_rules())
    return [_offer(entry, graph, model, found, image_format) for entry in catalogue]


def _offer(
    entry: Entry, graph: CapturedGraph, model: nn.Module, found: list[FoundSite], image_format: ImageFormat | None
) -> Offer:
    selection = Selection(entry)
    if entry.kind in WHERE:
        return Offer(entry, where=WHERE[entry.kind])
    if entry.kind == "input":
        try:
            inputs = choose_input_sites(graph, [Selection(entry, pattern="**")], image_format)
        except InputError as error:
            return Offer(entry, reason=str(error))
        needed = {"floating": "floating", "tokens": "token"}.get(entry.needs, "image")
        return Offer(entry, tuple(each.name for each in inputs), reason="" if inputs else f"there is no {needed} input")
    own = [site.name for site in found if site.entry == entry.name]
    inserted = [] if own else [each.name for each in choose_insertions(graph, model, [selection], found)]
    return Offer(entry, tuple(own or inserted), reason="" if own or inserted else "the model has no place for it")
