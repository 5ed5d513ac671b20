"""`stn-fx hparams`: the catalogue, or what one model offers of it."""

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from stn_fx.augment.image_format import ImageFormat
from stn_fx.compiler.offers import Offer, offers
from stn_fx.example_input import example_input
from stn_fx.hparams import CATALOGUE, Component
from stn_fx.model_reference import load_model

from .options import parse_arguments, parse_shape
from .report import BatchAxisOption, InputShapeOption, ModelArgOption

MANY_PLACES = 6


def hparams(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="file.py, file.py:NAME, torchvision:NAME, or timm:NAME; else the catalogue."
        ),
    ] = None,
    input_shape: InputShapeOption = None,
    batch_axis: BatchAxisOption = None,
    model_arg: ModelArgOption = None,
) -> None:
    """List what can be tuned: bounds, start values and sources; with a model, at which of its places.

    [bold]Examples[/bold]

      [cyan]stn-fx hparams[/cyan]
      the whole catalogue

      [cyan]stn-fx hparams torchvision:vit_b_16[/cyan]
      what of it fits that model, and the places that a pattern (dropout@encoder.**) can name
    """
    console = Console()
    if model is None:
        console.print(_catalogue_table())
        return
    torch.manual_seed(0)
    loaded = load_model(model, arguments=parse_arguments(model_arg or []))
    shape = None if input_shape is None else parse_shape(input_shape)
    example = example_input(loaded.model, shape, vars(loaded.namespace) if loaded.namespace else {}, batch_axis or 0)
    console.print(f"Input: {example.description}", highlight=False)
    found = offers(loaded.model, example.inputs, batch_axis, ImageFormat())
    console.print(_offer_table(found))
    for each in found:
        if each.reason:
            console.print(f"{each.entry.name} does not fit: {each.reason}", style="dim", highlight=False, markup=False)


def _catalogue_table() -> Table:
    table = _table("Catalogue", "name", "values", "start", "scale", "what it is", "from")
    for entry in CATALOGUE:
        for component in entry.components:
            first = component is entry.components[0]
            options = "".join(f"; option {option.name}: {option.description}" for option in entry.options)
            table.add_row(
                entry.full_name(component.name),
                _values(component),
                str(component.initial) if not isinstance(component.initial, float) else f"{component.initial:g}",
                f"{component.scale:g}",
                entry.description + options if first else "",
                entry.source if first else "",
            )
    return table


def _values(component: Component) -> str:
    low, high = (f"{bound:g}" if isinstance(bound, float) else str(bound) for bound in (component.low, component.high))
    return f"{low} to {high}{', whole' * component.discrete}"


def _offer_table(found: list[Offer]) -> Table:
    table = _table("What this model offers", "name", "places", "which")
    for each in found:
        if each.reason:
            continue
        shown = ", ".join(each.places[:MANY_PLACES])
        more = f" and {len(each.places) - MANY_PLACES} more" if len(each.places) > MANY_PLACES else ""
        table.add_row(each.entry.name, str(len(each.places)) if each.places else "-", shown + more or each.where)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    return table
