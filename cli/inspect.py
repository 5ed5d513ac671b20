"""`stn-fx inspect`: the dry run. It reports what would be done with a model, and writes nothing."""

from rich.console import Console

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


def inspect(
    model: ModelArgument,
    hparams: HparamsOption = None,
    input_shape: InputShapeOption = None,
    image_format: ImageFormatOption = None,
    response: ResponseOption = "rowwise",
    batch_axis: BatchAxisOption = None,
    model_arg: ModelArgOption = None,
    json_file: JsonOption = None,
    seed: SeedOption = 0,
) -> None:
    """Show what stn_fx would do with a model: hyperparameters and where they act, how each parameter responds, what is
    left out and why, and the cost of an update. Writes nothing.

    [bold]Examples[/bold]

      [cyan]stn-fx inspect timm:vit_tiny_patch16_224 --hparams dropout,drop_path[/cyan]
      MODEL is named as in stn-fx convert

      [cyan]stn-fx inspect mymodel.py --json - | jq .unconditioned[/cyan]
      the report as JSON alone on the output; --json FILE writes it beside the tables
    """
    console = Console(stderr=json_file == STDOUT)
    compile_and_report(
        console, model, hparams, input_shape, image_format, response, batch_axis, model_arg, json_file, seed
    )
