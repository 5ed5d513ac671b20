"""Labelled images in memory and their split into training, validation and test part.

Shapes: N images, C channels, H height, W width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from stn_fx.errors import InputError

RESIZE_CHUNK = 4096


@dataclass(frozen=True)
class ImageSet:
    """Images with their classes.

    Attributes:
        images: (N, C, H, W), uint8, 0 to 255.
        labels: (N,), int64, in [0, number of classes).
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8 or not len(self.images):
            raise InputError(f"Images must be uint8 (N, C, H, W), not {self.images.dtype} {tuple(self.images.shape)}.")
        if self.labels.shape != self.images.shape[:1]:
            raise InputError(f"There are {len(self.images)} images and {tuple(self.labels.shape)} labels.")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def channels(self) -> int:
        """C."""
        return self.images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.images.shape[2], self.images.shape[3]

    def select(self, indices: Tensor) -> "ImageSet":
        """The images at these positions."""
        return ImageSet(self.images[indices], self.labels[indices])

    def resized(self, side: int) -> "ImageSet":
        """All images as squares of this side (pixels), bilinear with antialiasing."""
        if self.size == (side, side):
            return self
        parts = [
            F.interpolate(part.float(), (side, side), mode="bilinear", antialias=True).round().clamp(0, 255).byte()
            for part in self.images.split(RESIZE_CHUNK)
        ]
        return replace(self, images=torch.cat(parts))

    def with_channels(self, channels: int) -> "ImageSet":
        """Grey images repeated, coloured ones made grey (their mean); InputError where neither fits."""
        if self.channels == channels:
            return self
        if self.channels == 1:
            return replace(self, images=self.images.expand(-1, channels, -1, -1))
        if channels == 1:
            return replace(self, images=self.images.float().mean(1, keepdim=True).round().byte())
        raise InputError(f"The model takes {channels} channels and the images have {self.channels}. Use another model.")


@dataclass(frozen=True)
class Splits:
    """The three parts that tuning needs.

    Attributes:
        train: base and response parameters are trained on it.
        valid: hyperparameters are tuned on it.
        test: read once, at the end.
        classes: names of the classes.
    """

    train: ImageSet
    valid: ImageSet
    test: ImageSet
    classes: tuple[str, ...]

    def resized(self, side: int) -> "Splits":
        """See `ImageSet.resized`."""
        return self._each(lambda part: part.resized(side))

    def with_channels(self, channels: int) -> "Splits":
        """See `ImageSet.with_channels`."""
        return self._each(lambda part: part.with_channels(channels))

    def _each(self, change: Callable[[ImageSet], ImageSet]) -> "Splits":
        return replace(self, train=change(self.train), valid=change(self.valid), test=change(self.test))


def split_images(
    train: ImageSet,
    test: ImageSet | None,
    classes: tuple[str, ...],
    valid_fraction: float = 0.15,
    examples: int | None = None,
    seed: int = 0,
) -> Splits:
    """Split by a seed; the same arguments give the same split on every machine.

    Args:
        train: everything that is not test data.
        test: None = the same fraction as for validation is taken from `train`.
        classes: names of the classes.
        valid_fraction: share of `train` to tune on.
        examples: use no more than this many of `train`, chosen by the seed (validation included).
        seed: of the order.

    Raises:
        InputError: a fraction or number that leaves a part empty.
    """
    if not 0 < valid_fraction < 0.5:
        raise InputError(f"valid_fraction={valid_fraction:g} is not between 0 and 0.5.")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    share = valid_fraction
    if test is None:
        held_out = round(valid_fraction * len(order))
        if held_out < 1:
            raise _too_few(len(order), valid_fraction, "test")
        test = train.select(order[:held_out])
        order = order[held_out:]
        # The same number for validation, as a share of what is left.
        share = valid_fraction / (1 - valid_fraction)
    order = order[:examples]
    count = round(share * len(order))
    if not 1 <= count < len(order):
        raise _too_few(len(order), share, "validation")
    return Splits(train.select(order[count:]), train.select(order[:count]), test, classes)


def _too_few(images: int, share: float, purpose: str) -> InputError:
    return InputError(f"{images} images are too few to hold out {share:.0%} of them for {purpose}. Use more images.")
