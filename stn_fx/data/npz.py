"""Archives of NumPy arrays.

Understood names, for a part `train` or `test`: `x_train` and `y_train`, `train_x` and `train_y`, or JPEG files end to
end in `train_jpeg` with their borders in `train_offsets` (N + 1) and classes in `train_y`. Without parts: `x` and `y`.
Optional: `classes`, their names. Images are (N, H, W), (N, H, W, C) or (N, C, H, W), as bytes or as floats from 0 to 1.
"""

import zipfile
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stn_fx.data.images import ImageSet
from stn_fx.errors import InputError

CHANNELS = (1, 3, 4)


def load_npz(path: Path) -> tuple[ImageSet, ImageSet | None, tuple[str, ...] | None]:
    """Training part, test part or None, and names of the classes or None.

    Raises:
        InputError: the file is damaged, needs pickle, or has not the names and shapes above.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read: {error}. Save plain arrays with numpy.savez.") from error
    train = _part(arrays, "train") or _whole(arrays)
    if train is None:
        raise InputError(
            f"{path} holds {', '.join(arrays) or 'nothing'}; expected x_train and y_train, train_x and train_y, "
            f"train_jpeg, train_offsets and train_y, or x and y."
        )
    classes = tuple(str(name) for name in arrays["classes"]) if "classes" in arrays else None
    return train, _part(arrays, "test"), classes


def _part(arrays: dict[str, Any], part: str) -> ImageSet | None:
    for images, labels in ((f"x_{part}", f"y_{part}"), (f"{part}_x", f"{part}_y")):
        if images in arrays and labels in arrays:
            return ImageSet(_images(arrays[images]), _labels(arrays[labels]))
    if f"{part}_jpeg" in arrays and f"{part}_offsets" in arrays:
        return ImageSet(_decoded(arrays[f"{part}_jpeg"], arrays[f"{part}_offsets"]), _labels(arrays[f"{part}_y"]))
    return None


def _whole(arrays: dict[str, Any]) -> ImageSet | None:
    return ImageSet(_images(arrays["x"]), _labels(arrays["y"])) if {"x", "y"} <= arrays.keys() else None


def _labels(array: Any) -> Tensor:
    return torch.as_tensor(np.asarray(array).astype(np.int64)).flatten()


def _images(array: Any) -> Tensor:
    """To uint8 (N, C, H, W)."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in CHANNELS and array.shape[1] not in CHANNELS:
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in CHANNELS:
        raise InputError(f"Images of shape {array.shape}: expected (N, H, W), (N, H, W, C) or (N, C, H, W).")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise InputError(
                f"Images of {array.dtype} must be from 0 to 1; these are {array.min():g} to {array.max():g}."
            )
        array = np.round(array * 255)
    if array.min() < 0 or array.max() > 255:
        raise InputError(f"Images of {array.dtype} must be from 0 to 255; these are {array.min()} to {array.max()}.")
    return torch.as_tensor(np.ascontiguousarray(array.astype(np.uint8)))


def _decoded(jpeg: Any, offsets: Any) -> Tensor:
    """JPEG files end to end, all of one size, to uint8 (N, 3, H, W)."""
    content = jpeg.tobytes()
    images = [np.asarray(Image.open(BytesIO(content[start:end])).convert("RGB")) for start, end in pairwise(offsets)]
    return torch.as_tensor(np.stack(images)).permute(0, 3, 1, 2).contiguous()
