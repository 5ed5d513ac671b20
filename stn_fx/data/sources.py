"""From a reference to images: `digits`, or a path whose kind is told by what is there.

| what is there | kind |
|---|---|
| `train-images-idx3-ubyte` and its three companions, each with or without `.gz` | idx (MNIST, Fashion-MNIST) |
| a file `.npz`, or a folder that holds one | npz |
| subfolders with images, one for each class, with or without `train/` and `test/` above them | image folder |
"""

from dataclasses import dataclass
from pathlib import Path

from stn_fx.data.digits import load_digits
from stn_fx.data.folder import is_image_folder, load_folder
from stn_fx.data.idx import is_idx_folder, load_idx
from stn_fx.data.images import ImageSet
from stn_fx.data.npz import load_npz
from stn_fx.errors import InputError

DIGITS = "digits"
"""The one data set that needs no path."""


@dataclass(frozen=True)
class Source:
    """Images as they are stored.

    Attributes:
        description: one line for people.
        train: everything that is not test data.
        test: the source's own test data; None where it has none.
        classes: names of the classes.
    """

    description: str
    train: ImageSet
    test: ImageSet | None
    classes: tuple[str, ...]


def load_images(reference: str, side: int | None = None) -> Source:
    """Read images.

    Args:
        reference: `digits` (scikit-learn's 1,797 images of 8x8 pixels, no download) or a path.
        side: side in pixels that images of different sizes are brought to while an image folder is read; None = that of
            its first image.

    Raises:
        InputError: there is nothing at the path, nothing that is understood, or it cannot be read.
    """
    if reference == DIGITS:
        return _source("scikit-learn's digits", *load_digits())
    path = Path(reference).expanduser()
    if not path.exists():
        raise InputError(f"There is no data at {path}. Give 'digits', or the path of a file or folder that exists.")
    if path.is_file() and path.suffix == ".npz":
        return _source(path.name, *load_npz(path))
    if path.is_dir():
        archives = sorted(path.glob("*.npz"))
        if is_idx_folder(path):
            return _source(f"idx files in {path}", *load_idx(path))
        if len(archives) == 1:
            return _source(archives[0].name, *load_npz(archives[0]))
        if is_image_folder(path):
            return _source(f"image folder {path}", *load_folder(path, side))
    raise InputError(
        f"{path} holds no data that is understood: neither idx files (train-images-idx3-ubyte, with or without .gz), "
        f"nor one .npz archive, nor a subfolder with images for each class."
    )


def _source(name: str, train: ImageSet, test: ImageSet | None, classes: tuple[str, ...] | None) -> Source:
    labels = [part.labels for part in (train, test) if part is not None]
    lowest, highest = min(int(x.min()) for x in labels), max(int(x.max()) for x in labels)
    if lowest < 0 or highest < 1 or (classes is not None and highest >= len(classes)):
        raise InputError(
            f"{name}: labels go from {lowest} to {highest}; they must be class indices from 0 on, two or more."
        )
    classes = classes or tuple(str(label) for label in range(highest + 1))
    height, width = train.size
    count = f"{len(train):,} images" + (f" + {len(test):,} for test" if test is not None else "")
    description = f"{name}: {count}, {train.channels}x{height}x{width}, {len(classes)} classes"
    return Source(description, train, test, classes)
