"""`stn-fx tune`: train a model on images and tune its hyperparameters, then compare with the start values."""

import json
import re
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from stn_fx.bilevel import (
    BilevelTrainer,
    Callback,
    Checkpoint,
    FitResult,
    LiveProgress,
    RunFolder,
    TensorBoard,
    WeightAverage,
)
from stn_fx.bilevel.atomic import write_atomically
from stn_fx.bilevel.checkpoint_file import checkpoints_in
from stn_fx.bilevel.response_step import EVERY, FRACTION, LEAST
from stn_fx.bilevel.steps import ENTROPY_WEIGHT
from stn_fx.bilevel.trainer import TRAIN_STEPS
from stn_fx.errors import InputError

from .options import RESPONSE_HELP, OptimizerName, ScheduleName
from .tables import comparison_table, verdict_lines, write_comparison
from .tune_options import FILE, TuneOptions
from .tune_task import how_to_load, image_task

TRAINING, TUNING, OUTPUT = "Training", "Tuning", "Output"


def tune(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="torchvision:NAME, timm:NAME, file.py, or file.py:NAME (see below)."),
    ] = None,
    hparams: Annotated[
        str, typer.Option(help="What to tune, separated by commas; options in parentheses, places after @.")
    ] = "dropout,cutout,weight_decay",
    data: Annotated[
        str, typer.Option(help="digits, or a path: idx files, .npz (x, y or x_train, ...), image folder.")
    ] = "digits",
    epochs: Annotated[int, typer.Option(min=1, rich_help_panel=TRAINING, help="Passes over the training data.")] = 30,
    batch_size: Annotated[int, typer.Option(min=1, rich_help_panel=TRAINING)] = 64,
    optimizer: Annotated[
        OptimizerName, typer.Option(rich_help_panel=TRAINING, help="Of the weights and of the response.")
    ] = OptimizerName.ADAM,
    lr: Annotated[
        float | None,
        typer.Option(
            min=0, rich_help_panel=TRAINING, help="Learning rate of the weights; else 0.001 (adam), 0.01 (sgd)."
        ),
    ] = None,
    schedule: Annotated[
        ScheduleName,
        typer.Option(
            rich_help_panel=TRAINING,
            help="Of the learning rates: cosine and linear fall to 0, warmup-cosine rises for a tenth before it falls.",
        ),
    ] = ScheduleName.COSINE,
    accumulate: Annotated[
        int, typer.Option(min=1, rich_help_panel=TRAINING, help="Batches whose gradients are averaged into one update.")
    ] = 1,
    clip_norm: Annotated[
        float | None, typer.Option(rich_help_panel=TRAINING, help="Greatest norm of a gradient; else any.")
    ] = None,
    bf16: Annotated[
        bool,
        typer.Option("--bf16", rich_help_panel=TRAINING, help="Passes in bfloat16 where torch.autocast allows it."),
    ] = False,
    average: Annotated[
        float | None,
        typer.Option(
            metavar="DECAY",
            rich_help_panel=TRAINING,
            help="Also keep a moving average of the weights, as 0.999, in model-average.pt.",
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=TRAINING, help="Side in pixels that images are resized to.")
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=TRAINING, help="Use no more images than this, validation included."),
    ] = None,
    valid_fraction: Annotated[
        float, typer.Option(rich_help_panel=TRAINING, help="Share held out for tuning (and as much for test data).")
    ] = 0.15,
    seed: Annotated[
        int, typer.Option(min=0, rich_help_panel=TRAINING, help="Of weights, data order, masks and perturbations.")
    ] = 0,
    split_seed: Annotated[int, typer.Option(min=0, rich_help_panel=TRAINING, help="Of the split of the data.")] = 0,
    device: Annotated[
        str, typer.Option(rich_help_panel=TRAINING, help="cpu, cuda, cuda:1, ...; auto = a GPU where there is one.")
    ] = "auto",
    model_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", rich_help_panel=TRAINING, help="Argument of the model's factory; repeatable."
        ),
    ] = None,
    response: Annotated[str, typer.Option(rich_help_panel=TUNING, help=RESPONSE_HELP)] = "rowwise",
    response_every: Annotated[
        int, typer.Option(min=1, rich_help_panel=TUNING, help="The response learns in every so many updates.")
    ] = EVERY,
    response_fraction: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            rich_help_panel=TUNING,
            help=f"From this share of the batch, but at least {LEAST} examples: 1 = all.",
        ),
    ] = FRACTION,
    warmup: Annotated[
        int | None,
        typer.Option(min=0, rich_help_panel=TUNING, help="Epochs before tuning begins; else a fifth to two fifths."),
    ] = None,
    train_steps: Annotated[
        int, typer.Option(min=1, rich_help_panel=TUNING, help="Training updates between rounds of tuning.")
    ] = TRAIN_STEPS,
    valid_steps: Annotated[int, typer.Option(min=1, rich_help_panel=TUNING, help="Tuning updates in a round.")] = 1,
    hyper_lr: Annotated[
        float,
        typer.Option(min=0, rich_help_panel=TUNING, help="Learning rate of hyperparameters and scales."),
    ] = 0.03,
    response_lr: Annotated[
        float | None,
        typer.Option(min=0, rich_help_panel=TUNING, help="Learning rate of the response; else --lr."),
    ] = None,
    entropy_weight: Annotated[
        float, typer.Option(min=0, rich_help_panel=TUNING, help="Reward for wide perturbations, per nat.")
    ] = ENTROPY_WEIGHT,
    out: Annotated[
        Path | None, typer.Option(rich_help_panel=OUTPUT, help="Run folder; else runs/MODEL-DATA-TIME.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=OUTPUT, help="Replace a run there.")
    ] = False,
    save_every: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=OUTPUT, help="Save after so many batches too, not just every epoch."),
    ] = None,
    keep: Annotated[
        int, typer.Option(min=1, rich_help_panel=OUTPUT, help="How many of the last saved states stay.")
    ] = 2,
    tensorboard: Annotated[
        bool,
        typer.Option("--tensorboard", rich_help_panel=OUTPUT, help="Also write RUN/tensorboard; needs tensorboard."),
    ] = False,
    trust: Annotated[
        bool, typer.Option(rich_help_panel=OUTPUT, help="Measure every epoch how far to trust each hyperparameter.")
    ] = True,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", rich_help_panel=OUTPUT, help="Take up an interrupted run, from its folder alone."),
    ] = None,
    compare: Annotated[
        bool, typer.Option(rich_help_panel=OUTPUT, help="Also train at the start values, for the final table.")
    ] = True,
) -> None:
    """Train a model on images and tune its hyperparameters on held-out images, in one run.

    The model is used as it is: no base class, no changed layers. Where it has no dropout, dropout is inserted.

    [bold]Examples[/bold]

      [cyan]stn-fx tune torchvision:resnet18[/cyan]
      tunes dropout, cutout and weight decay on scikit-learn's digits

      [cyan]stn-fx tune timm:vit_tiny_patch16_224 --model-arg img_size=32 --hparams dropout,drop_path[/cyan]
      builds the model with other arguments, and tunes other hyperparameters

      [cyan]stn-fx tune mymodel.py:Net --data path/to/fashion-mnist --examples 10000 --epochs 60[/cyan]
      a class or factory of one's own, and a part of a data set on disk

      [cyan]stn-fx tune torchvision:resnet18 --hparams "dropout@layer4(initial=0.5), cutout(length=2..16)"[/cyan]
      dropout in one part of the model from a start value, cutout between bounds

      [cyan]stn-fx tune --resume runs/resnet18-digits-20260101-120000[/cyan]
      goes on where an interrupted or killed run was saved last, with the same results as if it had not been

    [bold]Hyperparameters[/bold]

    See [cyan]stn-fx hparams[/cyan]. Learning rates cannot be tuned this way.

    [bold]What is left[/bold]

    A run folder with values.json, schedule.csv and .json, history.csv and .json, schedule.png, comparison.csv, model.pt
    (the weights at the lowest validation loss, under the model's own keys), and model.json (how to build and feed it).
    Ctrl-C and SIGTERM save before they end the run.
    """
    console = Console()
    if resume is not None:
        _require_nothing_beside_resume(context)
        options, place, overwrite = TuneOptions.read(resume), resume, True
    else:
        if model is None:
            raise InputError("Name a MODEL to tune, as torchvision:resnet18, or give --resume RUN.")
        options, place = TuneOptions.of(context.params), out or _default_folder(model, data)
    made = [each for each in (place, *place.parents) if not each.exists()]
    try:
        _run(console, options, RunFolder(place, overwrite), overwrite, resume is not None)
    except KeyboardInterrupt:
        if (place / FILE).exists():
            console.print(f"To go on: stn-fx tune --resume {place}", soft_wrap=True, markup=False)
        raise
    finally:
        for each in made:  # folders of a command that failed before its run began
            if each.is_dir() and not any(each.iterdir()):
                each.rmdir()


class _Description(Callback):
    """Writes what the run was asked for when it begins, so that a command that fails before leaves nothing."""

    def __init__(self, folder: Path, options: TuneOptions, how: dict[str, Any], later: Path) -> None:
        self.folder, self.options, self.how, self.later = folder, options, how, later

    def fit_started(self, trainer: BilevelTrainer, epochs: int, result: FitResult) -> None:
        if not result.resumed_at:  # what a run that is replaced had saved of its second part
            for checkpoint in checkpoints_in(self.later):
                checkpoint.unlink()
        self.options.write(self.folder)
        text = json.dumps(self.how, indent=2)
        write_atomically(self.folder / "model.json", lambda temporary: temporary.write_text(text))


def _run(console: Console, options: TuneOptions, folder: RunFolder, overwrite: bool, resuming: bool) -> None:
    averages = [] if options.average is None else [WeightAverage(options.average)]
    task, recipe = image_task(console, options), options.recipe()
    console.print(f"Run folder: {folder.path}", markup=False)

    def saved(name: str) -> Checkpoint:
        place = folder.path / "checkpoints" / name
        return Checkpoint(place, options.keep, every_steps=options.save_every, overwrite=overwrite)

    def place_to_resume(checkpoint: Checkpoint) -> Path | None:
        return checkpoint.folder if resuming and checkpoints_in(checkpoint.folder) else None

    def logged(name: str) -> list[Callback]:
        return [TensorBoard(folder.path / "tensorboard" / name)] if options.tensorboard else []

    checkpoint = saved("tuned")
    description = _Description(folder.path, options, how_to_load(options, task.splits), saved("fixed").folder)
    callbacks = [LiveProgress(console, "tuned"), description, folder, *averages, *logged("tuned"), checkpoint]
    tuned = task.tuned(recipe, options.seed, callbacks, place_to_resume(checkpoint))
    fixed = None
    if options.compare:
        checkpoint = saved("fixed")
        callbacks = [LiveProgress(console, "fixed"), *logged("fixed"), checkpoint]
        fixed = task.fixed(recipe, options.seed, callbacks, place_to_resume(checkpoint))
    runs = {"tuned": tuned} | ({} if fixed is None else {"fixed": fixed})
    console.print(comparison_table(runs, options.epochs))
    write_comparison(folder.path / "comparison.csv", runs)
    for average in averages:
        write_atomically(folder.path / "model-average.pt", partial(torch.save, average.model.state_dict()))
        loss = average.evaluations[-1].loss
        console.print(f"Averaged weights (model-average.pt): validation loss {loss:.4f} after the last epoch")
    for line in verdict_lines(tuned.result):
        console.print(line, markup=False, highlight=False)
    best = tuned.result.best
    if best is not None and best.outer_step == 0 < tuned.result.history[-1].outer_step:
        console.print(
            f"The lowest validation loss was in epoch {best.epoch}, before tuning began: model.pt holds weights that "
            f"the tuned values did not train. More epochs, a lower --lr or a shorter --warmup may help."
        )
    console.print(f"Values, schedule, picture and weights: {folder.path}", markup=False)


def _require_nothing_beside_resume(context: typer.Context) -> None:
    """A resumed run has the options that it began with: others beside them would be ignored, or break it."""
    given = [
        name
        for name in context.params
        if name != "resume" and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise InputError(
            f"--resume takes every option from the run folder, and beside it was given: {', '.join(given)}. Leave that "
            f"out, or begin a new run."
        )


def _default_folder(model: str, data: str) -> Path:
    # Not every file system takes the colon of a reference, and the slash of a path would make folders.
    name = re.sub(r"[^\w.-]+", "-", re.sub(r"\.py(?=:|$)", "", model)).strip("-.")
    return Path("runs") / f"{name}-{Path(data).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
