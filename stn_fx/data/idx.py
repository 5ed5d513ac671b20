"""The idx format of MNIST and Fashion-MNIST (LeCun, Cortes & Burges): big-endian header, then raw bytes."""

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from stn_fx.data.images import ImageSet
from stn_fx.errors import InputError

UNSIGNED_BYTE = 0x08


def is_idx_folder(path: Path) -> bool:
    """Whether the folder holds training images in this format."""
    return any((path / f"train-images-idx3-ubyte{suffix}").exists() for suffix in ("", ".gz"))


def load_idx(path: Path) -> tuple[ImageSet, ImageSet, None]:
    """Training and test part; InputError names a file that is missing or damaged."""
    return _part(path, "train"), _part(path, "t10k"), None


def _part(path: Path, name: str) -> ImageSet:
    images = read_idx(_find(path, f"{name}-images-idx3-ubyte"))
    labels = read_idx(_find(path, f"{name}-labels-idx1-ubyte"))
    return ImageSet(images.unsqueeze(1), labels.long())


def _find(path: Path, name: str) -> Path:
    for candidate in (path / name, path / f"{name}.gz"):
        if candidate.exists():
            return candidate
    raise InputError(f"{path / name} is missing, with and without .gz. Put it beside the others.")


def read_idx(path: Path) -> Tensor:
    """An array of unsigned bytes; InputError where the file is not one."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}. Download it again.") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTE:
        raise InputError(f"{path} is not an idx file of unsigned bytes. Download it again.")
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if len(content) != start + math.prod(shape):
        raise InputError(
            f"{path} has {len(content) - start} values and announces {math.prod(shape)}. Download it again."
        )
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(shape)
