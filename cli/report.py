"""What `inspect` and `convert` share: their options, the compiled model, and the report as a table or as JSON."""

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import stn_fx
from stn_fx.errors import InputError
from stn_fx.example_input import example_input
from stn_fx.model_reference import LoadedModel, load_model

from .options import RESPONSE_HELP, parse_arguments, parse_image_format, parse_response, parse_shape

STDOUT = Path("-")

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="file.py, file.py:NAME, torchvision:NAME, or timm:NAME (see below).")
]
HparamsOption = Annotated[
    str | None,
    typer.Option(
        help="What to tune, separated by commas; options in parentheses, places after @. "
        "Else every dropout and drop path that the model has, and weight decay."
    ),
]
InputShapeOption = Annotated[
    str | None, typer.Option(metavar="SIZES", help="Shape of one example, as 3,32,32; else deduced from the model.")
]
ImageFormatOption = Annotated[
    str | None,
    typer.Option(
        metavar="MEAN/STD", help="Normalisation of images, as 0.5/0.25 or 0.49,0.48,0.45/0.25; colour needs it."
    ),
]
ResponseOption = Annotated[str, typer.Option(help=RESPONSE_HELP)]
BatchAxisOption = Annotated[
    int | None, typer.Option(min=0, help="Axis of the inputs that holds the batch; else found by analysis.")
]
ModelArgOption = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Argument of the model's factory; repeatable.")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the whole report as JSON; - is the output.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Of the model's and the response's initial values.")]


def compile_and_report(
    console: Console,
    model: str,
    hparams: str | None,
    input_shape: str | None,
    image_format: str | None,
    response: str,
    batch_axis: int | None,
    model_arg: list[str] | None,
    json_file: Path | None,
    seed: int,
) -> tuple[LoadedModel, stn_fx.SelfTuningModule]:
    """Load and compile the model, and show the report; as JSON on the output it comes without the tables."""
    structure, arguments = parse_response(response), parse_arguments(model_arg or [])
    shape = None if input_shape is None else parse_shape(input_shape)
    torch.manual_seed(seed)
    loaded = load_model(model, arguments=arguments)
    example = example_input(loaded.model, shape, vars(loaded.namespace) if loaded.namespace else {}, batch_axis or 0)
    console.print(f"Input: {example.description}", highlight=False)
    stn = stn_fx.transform(
        loaded.model, hparams, example.inputs, batch_axis=batch_axis, response=structure, seed=seed,
        image_format=None if image_format is None else parse_image_format(image_format),
    )  # fmt: skip
    report = stn.report
    if json_file == STDOUT:
        sys.stdout.write(json.dumps(report.to_dict(), indent=2) + "\n")
        return loaded, stn
    console.print(report)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(report.to_dict(), indent=2))
        except OSError as error:
            raise InputError(f"--json {json_file} cannot be written: {error}. Choose another place.") from error
        console.print(f"\nReport: {json_file}", markup=False)
    return loaded, stn
