"""The task that the options of `stn-fx tune` describe: the images, split and brought to the model, and the model."""

from typing import Any

from rich.console import Console
from torch import nn

from stn_fx.bilevel.image_task import ImageTask
from stn_fx.data import Splits, load_images, split_images
from stn_fx.data.batches import Normalisation
from stn_fx.model_reference import input_channels, load_model

from .options import parse_arguments, parse_device, parse_response
from .tune_options import TuneOptions

SMALL_PIXELS = 16
ENLARGED_PIXELS = 32


def image_task(console: Console, options: TuneOptions) -> ImageTask:
    """The task that options describe; reads the data, and says what was done to them."""
    place, structure = parse_device(options.device), parse_response(options.response)
    arguments = parse_arguments(options.model_arg)
    splits = _splits(console, options)
    loaded = load_model(options.model, len(splits.classes), splits.train.channels, arguments)
    splits = _with_channels(console, splits, input_channels(loaded.model))

    def build() -> nn.Module:
        return load_model(options.model, len(splits.classes), splits.train.channels, arguments).model

    return ImageTask(build, splits, options.hparams, structure, options.batch_size, place)


def how_to_load(options: TuneOptions, splits: Splits) -> dict[str, Any]:
    """What it takes to use model.pt: the model's arguments, and what was done to the images."""
    image_format = Normalisation.of(splits.train).image_format
    return {
        "model": options.model,
        "arguments": parse_arguments(options.model_arg),
        "classes": list(splits.classes),
        "channels": splits.train.channels,
        "image_size": list(splits.train.size),
        "pixels": "(value in [0, 1] - mean) / std, by channel",
        "mean": image_format.mean,
        "std": image_format.std,
    }


def _splits(console: Console, options: TuneOptions) -> Splits:
    """Read and split the images; says what was read and what was done to it."""
    side = options.image_size
    source = load_images(options.data, side)
    console.print(f"Data: {source.description}")
    splits = split_images(
        source.train, source.test, source.classes, options.valid_fraction, options.examples, options.split_seed
    )
    parts = (len(splits.train), len(splits.valid), len(splits.test))
    console.print("Split: {:,} for training, {:,} for validation, {:,} for test".format(*parts))
    if side is None and min(splits.train.size) < SMALL_PIXELS:
        side = ENLARGED_PIXELS
    if side is not None and splits.train.size != (side, side):
        console.print(f"Images are resized to {side}x{side} pixels (--image-size chooses another size).")
        splits = splits.resized(side)
    return splits


def _with_channels(console: Console, splits: Splits, channels: int | None) -> Splits:
    """Bring the images to the channels that the model takes; says so where it changes them."""
    if channels is None or channels == splits.train.channels:
        return splits
    how = "grey images are repeated" if splits.train.channels == 1 else "colours are averaged"
    console.print(f"The model takes {channels} channels: {how}.")
    return splits.with_channels(channels)
