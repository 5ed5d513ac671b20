"""The two tasks of `quality.py`: data, model, hyperparameters and the points that tuning starts from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from simple_cnn import SimpleCNN
from torch import nn

from stn_fx.data import Splits, load_images, split_images
from stn_fx.data.batches import ImageBatches, Normalisation
from stn_fx.transform import ResponseForm, SelfTuningModule, transform

Values = dict[str, float]
SPLIT_SEED = 0


@dataclass(frozen=True)
class Task:
    """Everything that all methods have in common.

    Attributes:
        name: of the task, in files.
        data: folder below the data root.
        build: makes the untrained model; called after torch's seed was set.
        hparams: as for `stn_fx.transform`; their bounds are the ranges of the searches.
        starts: initial values by name of the starting point; the first is that of the published experiments.
        examples: of the training data that are used, validation included; chosen by a fixed seed.
        valid_fraction: share of these for validation.
        plain_epochs: length of a plain run: one trial of a search.
        learning_rate: of SGD with momentum 0.9, constant.
        logarithmic: entries that searches draw on a logarithmic scale, with their lowest value.
        batch_size: of training.
        seeds_elsewhere: how many seeds tuning has from starts that are not the published one.
    """

    name: str
    data: str
    build: Callable[[], nn.Module]
    hparams: str
    starts: Mapping[str, Values]
    examples: int
    plain_epochs: int
    learning_rate: float
    valid_fraction: float = 0.15
    logarithmic: Mapping[str, float] = field(default_factory=dict)
    batch_size: int = 128
    seeds_elsewhere: int = 1

    def splits(self, root: Path) -> Splits:
        """Training, validation and test images."""
        source = load_images(str(root / self.data))
        return split_images(
            source.train, source.test, source.classes, self.valid_fraction, self.examples, seed=SPLIT_SEED
        )

    def wrapped(self, splits: Splits, seed: int, response: ResponseForm = "rowwise") -> SelfTuningModule:
        """A new, untrained model; the seed is that of its weights, masks and perturbations."""
        normalisation = Normalisation.of(splits.train)
        torch.manual_seed(seed)
        x, _ = next(iter(ImageBatches(splits.train, normalisation, self.batch_size)))
        image_format = normalisation.image_format
        return transform(self.build(), self.hparams, (x,), response=response, seed=seed, image_format=image_format)


def _simple_cnn_start(rates: list[float], holes: float, length: float) -> Values:
    dropout = {f"dropout.dropout{number}": rate for number, rate in enumerate(rates, start=1)}
    return dropout | {"cutout.holes": holes, "cutout.length": length}


FASHION = Task(
    name="fashion",
    data="fashion-mnist",
    build=SimpleCNN,
    hparams="dropout,cutout",
    starts={
        "published": _simple_cnn_start([0.05] * 4, 1, 4),
        "fifth": _simple_cnn_start([0.2] * 4, 2, 8),
        "half": _simple_cnn_start([0.5] * 4, 3, 12),
        "front": _simple_cnn_start([0.5, 0.5, 0.05, 0.05], 1, 4),
        "back": _simple_cnn_start([0.05, 0.05, 0.7, 0.7], 3, 12),
    },
    examples=10_000,
    plain_epochs=30,
    learning_rate=0.02,
)

COLOURS = ("brightness", "contrast", "saturation", "hue")


def _resnet_start(drop: float, cutout: tuple[float, float], colour: float, decay: float, smoothing: float) -> Values:
    strengths = {name: colour / 2 if name == "hue" else colour for name in COLOURS}
    return strengths | {
        "drop_path": drop,
        "cutout.holes": cutout[0],
        "cutout.length": cutout[1],
        "translation": colour / 2,
        "weight_decay": decay,
        "label_smoothing": smoothing,
    }


CIFAR = Task(
    name="cifar",
    data="cifar10-jpeg",
    build=lambda: timm.create_model("test_resnet", num_classes=10, drop_path_rate=0.05),
    hparams=f"drop_path(shared),cutout,{','.join(COLOURS)},translation,weight_decay,label_smoothing",
    starts={
        "published": _resnet_start(0.05, (1, 4), 0.1, 5e-4, 0.05),
        "low": _resnet_start(0.01, (1, 2), 0.02, 1e-5, 0.01),
        "half": _resnet_start(0.5, (2, 12), 0.5, 1e-2, 0.5),
        "drop": _resnet_start(0.7, (1, 4), 0.1, 5e-4, 0.05),
        "augment": _resnet_start(0.05, (3, 16), 0.7, 5e-4, 0.05),
    },
    examples=5_000,
    plain_epochs=20,
    learning_rate=0.05,
    logarithmic={"weight_decay": 1e-6},
    seeds_elsewhere=3,  # runs differ more than on the other task, and take half the time
)

TASKS = {task.name: task for task in (FASHION, CIFAR)}
WITH_VARIANTS = FASHION.name
"""The task that the variants are run on."""
WITHOUT_BATCH_NORMS = FASHION.name
"""The task whose model has none."""
