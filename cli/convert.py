"""`stn-fx convert`: report on a model, write its hyper-conditioned forward as a Python module, and prove it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from stn_fx.compiler.emit import emit
from stn_fx.compiler.proof import Proof, prove
from stn_fx.errors import StnError

from .report import (
    STDOUT,
    BatchAxisOption,
    HparamsOption,
    ImageFormatOption,
    InputShapeOption,
    JsonOption,
    ModelArgOption,
    ModelArgument,
    ResponseOption,
    SeedOption,
    compile_and_report,
)


def convert(
    model: ModelArgument,
    hparams: HparamsOption = None,
    input_shape: InputShapeOption = None,
    image_format: ImageFormatOption = None,
    response: ResponseOption = "rowwise",
    batch_axis: BatchAxisOption = None,
    model_arg: ModelArgOption = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The Python module to write; else MODEL_stn.py here.")
    ] = None,
    json_file: JsonOption = None,
    seed: SeedOption = 0,
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
    # With the report as JSON on the output, everything else goes to the error output.
    console = Console(stderr=json_file == STDOUT)
    loaded, stn = compile_and_report(
        console, model, hparams, input_shape, image_format, response, batch_axis, model_arg, json_file, seed
    )
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
