"""Image folders: one subfolder for each class, as torchvision's ImageFolder has it, read into memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from stn_fx.data.images import ImageSet
from stn_fx.errors import InputError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MEMORY_LIMIT_BYTES = 8 * 2**30


def is_image_folder(path: Path) -> bool:
    """Whether there are classes in it, or in a `train` below it."""
    return bool(_classes(path / "train") or _classes(path))


def load_folder(path: Path, side: int | None) -> tuple[ImageSet, ImageSet | None, tuple[str, ...]]:
    """Training part, test part (`test/` beside `train/`) or None, and the names of the subfolders.

    Args:
        path: the root.
        side: all images become RGB squares of this side (pixels); None = the size of the first image.

    Raises:
        InputError: a file is damaged, a test class is unknown, or the images would not fit into memory.
    """
    parts = bool(_classes(path / "train"))
    train_root = path / "train" if parts else path
    classes = _classes(train_root)
    if side is None:
        first = next(_files(train_root / classes[0]))
        width, height = _open(first).size
    else:
        width, height = side, side
    test_classes = _classes(path / "test") if parts else []
    unknown = sorted(set(test_classes) - set(classes))
    if unknown:
        raise InputError(f"{path / 'test'} has classes that {train_root} has not: {', '.join(unknown)}.")
    train = _read(train_root, classes, (width, height))
    test = _read(path / "test", classes, (width, height)) if test_classes else None
    return train, test, tuple(classes)


def _classes(path: Path) -> list[str]:
    """Names of subfolders that hold images, sorted."""
    if not path.is_dir():
        return []
    return sorted(each.name for each in path.iterdir() if each.is_dir() and next(_files(each), None))


def _files(path: Path) -> Iterator[Path]:
    return (each for each in sorted(path.iterdir()) if each.suffix.lower() in SUFFIXES) if path.is_dir() else iter(())


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}. Remove or replace it.") from error


def _read(root: Path, classes: list[str], size: tuple[int, int]) -> ImageSet:
    files = [(file, label) for label, name in enumerate(classes) for file in _files(root / name)]
    width, height = size
    needed = len(files) * width * height * 3
    if needed > MEMORY_LIMIT_BYTES:
        raise InputError(
            f"{len(files)} images of {width}x{height} pixels need {needed / 2**30:.0f} GiB of memory. Use a smaller "
            f"image size, or stn_fx.BilevelTrainer with an own loader."
        )
    images = np.stack([np.asarray(_open(file).resize(size)) for file, _ in files])
    labels = torch.tensor([label for _, label in files])
    return ImageSet(torch.as_tensor(images).permute(0, 3, 1, 2).contiguous(), labels)
