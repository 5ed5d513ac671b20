"""`stn-fx hparams`: the catalogue, or what one model offers of it."""

from typing import Annotated

import torch
import typer
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stn_fx.augment.image_format import ImageFormat
from stn_fx.compiler.offers import Offer, offers
from stn_fx.example_input import example_input
from stn_fx.hparams import CATALOGUE, Component
from stn_fx.model_reference import load_model

from .options import parse_arguments, parse_shape
from .report import BatchAxisOption, InputShapeOption, ModelArgOption

MANY_PLACES = 6
INDENT = 4


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
        console.print(_catalogue(), highlight=False)
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


def _catalogue() -> Group:
    """A line for each hyperparameter, and below it what it is and where that comes from."""
    shown: list[RenderableType] = []
    for entry in CATALOGUE:
        for component in entry.components:
            line = Text(entry.full_name(component.name), style="bold")
            shown.append(line.append(f"  {_values(component)}", style="not bold"))
        options = "".join(f"; option {option.name}: {option.description}" for option in entry.options)
        shown.append(Padding(Text(f"{entry.description}{options}"), (0, 0, 0, INDENT)))
        shown.append(Padding(Text(entry.source, style="dim"), (0, 0, 1, INDENT)))
    return Group(*shown)


def _values(component: Component) -> str:
    low, high, start = (
        f"{value:g}" if isinstance(value, float) else str(value)
        for value in (component.low, component.high, component.initial)
    )
    return f"{low} to {high}{', whole' * component.discrete}; start {start}; scale {component.scale:g}"


def _offer_table(found: list[Offer]) -> Table:
    title = "What this model offers"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for column in ("name", "places", "which"):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for each in found:
        if each.reason:
            continue
        shown = ", ".join(each.places[:MANY_PLACES])
        more = f" and {len(each.places) - MANY_PLACES} more" if len(each.places) > MANY_PLACES else ""
        table.add_row(each.entry.name, str(len(each.places)) if each.places else "-", shown + more or each.where)
    return table
