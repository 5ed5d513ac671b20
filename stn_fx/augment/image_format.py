"""What the numbers of an image input mean: the normalisation between pixels in [0, 1] and what the model is given."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stn_fx.errors import InputError


@dataclass(frozen=True)
class ImageFormat:
    """Images as `(pixel - mean) / std`, channel by channel, of pixels in [0, 1]: what `Normalize(mean, std)` gives.

    Colour operations undo it, act on the pixels, clamp to [0, 1] and normalise again. Examples: `ImageFormat()` for
    images in [0, 1], `ImageFormat(std=1 / 255)` for 0 to 255, `ImageFormat(0.5, 0.5)` for -1 to 1, and
    `ImageFormat((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))` for ImageNet's.

    Attributes:
        mean: of each channel, or one number for all.
        std: of each channel, or one number for all; positive.

    Raises:
        InputError: a standard deviation that is not positive, or different numbers of channels.
    """

    mean: tuple[float, ...] | float = 0.0
    std: tuple[float, ...] | float = 1.0

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            numbers = (value,) if isinstance(value, (int, float)) else tuple(value)
            object.__setattr__(self, name, tuple(float(number) for number in numbers))
        if not self.means or not self.stds or len({len(self.means), len(self.stds), 1}) > 2:
            raise InputError(
                f"ImageFormat has {len(self.means)} means and {len(self.stds)} standard deviations. Give one of each "
                f"for every channel, or one for all."
            )
        if not all(each > 0 for each in self.stds):
            raise InputError(
                f"ImageFormat: std={self.std} must be positive: pixels are divided by it. Write 1 for images that are "
                f"not divided."
            )

    @property
    def means(self) -> tuple[float, ...]:
        """Means as a tuple of length 1 or C."""
        return self.mean if isinstance(self.mean, tuple) else (self.mean,)

    @property
    def stds(self) -> tuple[float, ...]:
        """Standard deviations as a tuple of length 1 or C."""
        return self.std if isinstance(self.std, tuple) else (self.std,)

    def check_channels(self, channels: int) -> None:
        """InputError where it describes another number of channels."""
        described = max(len(self.means), len(self.stds))
        if described not in (1, channels):
            raise InputError(
                f"ImageFormat describes {described} channels, and the images have {channels}. Give one mean and std "
                f"for each channel, or one number for all."
            )


def per_channel(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    """Constants (1, C or 1, 1, 1) on the device of `like`, filled there: a copy from the host would wait for it."""
    filled = [torch.full((), number, dtype=like.dtype, device=like.device) for number in numbers]
    return torch.stack(filled).reshape(1, -1, 1, 1)
