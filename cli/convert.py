"""`stn-fx convert`: report on a model, write its hyper-conditioned forward as a Python module, and prove it."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import stn_fx
from stn_fx.compiler.emit import emit
from stn_fx.compiler.proof import Proof, prove
from stn_fx.errors import StnError
from stn_fx.example_input import example_input
from stn_fx.model_reference import load_model

from .options import parse_arguments, parse_image_format, parse_response, parse_shape


def convert(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="file.py, file.py:NAME, torchvision:NAME, or timm:NAME (see below).")
    ],
    hparams: Annotated[
        str | None,
        typer.Option(
            help="What to tune, separated by commas; options in parentheses, places after @. "
            "Else every dropout and drop path that the model has, and weight decay."
        ),
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option(metavar="SIZES", help="Shape of one example, as 3,32,32; else deduced from the model."),
    ] = None,
    image_format: Annotated[
        str | None,
        typer.Option(
            metavar="MEAN/STD", help="Normalisation of images, as 0.5/0.25 or 0.49,0.48,0.45/0.25; colour needs it."
        ),
    ] = None,
    response: Annotated[str, typer.Option(help="How weights respond: rowwise, or lowrank:RANK (cheaper).")] = "rowwise",
    batch_axis: Annotated[
        int | None, typer.Option(min=0, help="Axis of the inputs that holds the batch; else found by analysis.")
    ] = None,
    model_arg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Argument of the model's factory; repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The Python module to write; else MODEL_stn.py here.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the whole report as JSON.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the model's and the response's initial values.")] = 0,
) -> None:
    """Show what stn_fx does with a model, and write the code that it runs.

    The module holds the base, linearized and response pass as plain functions that any Python process can import; the
    tensors lie beside it. It is then proven: a fresh process imports it and must give the same outputs.

    [bold]Examples[/bold]

      [cyan]stn-fx convert mymodel.py --hparams dropout,cutout[/cyan]
      the only model, factory or class in that file; mymodel.py:NAME says which of several

      [cyan]stn-fx convert torchvision:resnet18 --input-shape 3,64,64 --response lowrank:8[/cyan]
      another input shape than the one deduced, and the cheaper response

      [cyan]stn-fx convert timm:vit_tiny_patch16_224 --hparams drop_path --out vit_stn.py --json report.json[/cyan]

    [bold]Inputs[/bold]

    A file may declare a batch as [cyan]example_inputs[/cyan], a tuple of tensors, a dict of keyword inputs, or a
    function that returns one. Else the model's own configuration or its first layer tells the shape.
    """
    console = Console()
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
    console.print(report)
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_dict(), indent=2))
        console.print(f"\nReport: {json_file}")
    written = emit(stn.compiled, stn, out or Path(f"{_identifier(loaded.name)}_stn.py"))
    console.print(f"\nCode: {written.module}\nTensors: {written.tensors}", highlight=False)
    with console.status("proving it in a fresh process"):
        proof = prove(written.module, stn.compiled, stn)
    if not proof.rows:
        raise StnError(f"{written.module} does not run in a fresh process:\n{proof.failure}")
    console.print(_proof_table(proof))
    if not proof.passed:
        raise StnError(f"{written.module} does not compute what the compiled model does. Please report this as a bug.")
    console.print(f"Proven: largest difference {proof.difference:.1g}", style="green")


def _identifier(name: str) -> str:
    clean = "".join(letter if letter.isalnum() else "_" for letter in name)
    return clean if not clean[:1].isdigit() else f"_{clean}"


def _proof_table(proof: Proof) -> Table:
    table = Table(title="In a fresh process", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("function")
    for column in ("batch size", "largest difference", "of outputs up to"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for row in proof.rows:
        verdict = "[green]same[/green]" if row.passed else "[red]differs[/red]"
        table.add_row(row.function, str(row.batch_size), f"{row.difference:.1e}", f"{row.scale:.3g}", verdict)
    return table
