import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from stn_fx.data import ImageSet, image_batches, load_images, split_images
from stn_fx.errors import InputError


def image_set(count=100, channels=1, side=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, side, side), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 10)


def test_digits():
    source = load_images("digits")
    assert source.train.images.shape == (1797, 1, 8, 8)
    assert source.train.images.max() == 255
    assert source.test is None
    assert source.classes == tuple("0123456789")


def write_idx(path, array, compress):
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    if compress:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def write_idx_folder(path, compress=True):
    for part, count in (("train", 40), ("t10k", 10)):
        images = np.arange(count * 36).reshape(count, 6, 6) % 256
        write_idx(path / f"{part}-images-idx3-ubyte", images, compress)
        write_idx(path / f"{part}-labels-idx1-ubyte", np.arange(count) % 4, compress)


@pytest.mark.parametrize("compress", [True, False])
def test_idx_files(tmp_path, compress):
    write_idx_folder(tmp_path, compress)
    source = load_images(str(tmp_path))
    assert source.train.images.shape == (40, 1, 6, 6)
    assert source.train.images[1].flatten().tolist() == list(range(36, 72))
    assert source.test.labels.tolist() == [i % 4 for i in range(10)]
    assert "40 images + 10 for test, 1x6x6, 4 classes" in source.description


@pytest.mark.parametrize("damage", [b"", b"abcdefgh", b"\0\0\x08\x01\0\0\0\x09abc"])
def test_damaged_idx_files_are_named(tmp_path, damage):
    write_idx_folder(tmp_path, compress=False)
    path = tmp_path / "t10k-labels-idx1-ubyte"
    path.write_bytes(damage)
    with pytest.raises(InputError, match="t10k-labels"):
        load_images(str(tmp_path))
    path.unlink()
    with pytest.raises(InputError, match="missing"):
        load_images(str(tmp_path))
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(b"abc")[:-3])
    with pytest.raises(InputError, match="cannot be read"):
        load_images(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "shape", "dtype"),
    [
        (("x_train", "y_train", "x_test", "y_test"), (20, 8, 8), np.uint8),
        (("train_x", "train_y", "test_x", "test_y"), (20, 8, 8, 3), np.uint8),
        (("x", "y", None, None), (20, 3, 8, 8), np.float32),
    ],
)
def test_npz_archives(tmp_path, names, shape, dtype):
    images = np.random.default_rng(0).integers(0, 256, shape)
    images = images.astype(dtype) if dtype == np.uint8 else (images / 255).astype(dtype)
    arrays = {names[0]: images, names[1]: np.arange(20) % 4, "classes": np.array(["a", "b", "c", "d"])}
    if names[2]:
        arrays |= {names[2]: images[:5], names[3]: np.arange(5) % 4}
    np.savez(tmp_path / "images.npz", **arrays)
    for reference in (tmp_path, tmp_path / "images.npz"):
        source = load_images(str(reference))
        assert source.train.images.shape == (20, 3 if len(shape) == 4 else 1, 8, 8)
        assert (source.test is None) == (names[2] is None)
        assert source.classes == ("a", "b", "c", "d")


def write_image(path, side=8, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)


def test_npz_archives_of_jpeg_files(tmp_path):
    files = []
    for seed in range(4):
        write_image(tmp_path / "one.jpg", seed=seed)
        files.append((tmp_path / "one.jpg").read_bytes())
    offsets = np.cumsum([0, *map(len, files)])
    content = np.frombuffer(b"".join(files), dtype=np.uint8)
    np.savez(tmp_path / "jpeg.npz", train_jpeg=content, train_offsets=offsets, train_y=np.array([0, 1, 1, 0]))
    assert load_images(str(tmp_path / "jpeg.npz")).train.images.shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    "arrays",
    [
        {"a": np.zeros(3)},
        {"x": np.zeros((4, 8)), "y": np.arange(4)},
        {"x": np.full((4, 8, 8), 7.0), "y": np.arange(4)},
        {"x": np.zeros((4, 8, 8)), "y": np.arange(3)},
        {"x": np.zeros((4, 8, 8)), "y": np.arange(4) - 1},
        {"x": np.zeros((4, 8, 8)), "y": np.zeros(4)},
        {"x": np.array([{}], dtype=object), "y": np.arange(1)},
    ],
)
def test_other_archives_are_refused(tmp_path, arrays):
    np.savez(tmp_path / "images.npz", **arrays)
    with pytest.raises(InputError):
        load_images(str(tmp_path))


@pytest.mark.parametrize("parts", [False, True])
def test_image_folders(tmp_path, parts):
    for part in ("train", "test") if parts else (".",):
        for name in ("cat", "dog"):
            for seed in range(3):
                write_image(tmp_path / part / name / f"{seed}.png", side=8 if name == "cat" else 12, seed=seed)
    source = load_images(str(tmp_path))
    assert source.train.images.shape == (6, 3, 8, 8)
    assert source.classes == ("cat", "dog")
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (source.test is not None) == parts
    assert load_images(str(tmp_path), side=16).train.size == (16, 16)


def test_a_damaged_image_is_named(tmp_path):
    write_image(tmp_path / "cat" / "0.png")
    write_image(tmp_path / "dog" / "0.png")
    (tmp_path / "dog" / "bad.png").write_text("not an image")
    with pytest.raises(InputError, match=r"bad\.png"):
        load_images(str(tmp_path))


def test_paths_without_data_are_refused(tmp_path):
    with pytest.raises(InputError, match="no data at"):
        load_images(str(tmp_path / "missing"))
    with pytest.raises(InputError, match="no data that is understood"):
        load_images(str(tmp_path))


def test_splits_are_disjoint_complete_and_repeatable():
    images = image_set()
    images = ImageSet(torch.arange(100).byte().reshape(100, 1, 1, 1).expand(-1, 1, 2, 2), images.labels)
    first, second = (split_images(images, None, ("a",), valid_fraction=0.2, seed=3) for _ in range(2))
    parts = [part.images[:, 0, 0, 0].tolist() for part in (first.train, first.valid, first.test)]
    assert [len(part) for part in parts] == [60, 20, 20]
    assert sorted(parts[0] + parts[1] + parts[2]) == list(range(100))
    assert torch.equal(first.train.images, second.train.images)
    other = split_images(images, None, ("a",), valid_fraction=0.2, seed=4)
    assert not torch.equal(first.train.images, other.train.images)
    fewer = split_images(images, image_set(30), ("a",), valid_fraction=0.2, examples=50)
    assert [len(part) for part in (fewer.train, fewer.valid, fewer.test)] == [40, 10, 30]


@pytest.mark.parametrize("options", [{"valid_fraction": 0.0}, {"valid_fraction": 0.9}, {"examples": 2}])
def test_splits_that_leave_a_part_empty_are_refused(options):
    with pytest.raises(InputError):
        split_images(image_set(), None, ("a",), **options)


def test_resizing_and_channels():
    grey, colour = image_set(), image_set(channels=3)
    assert grey.resized(16).size == (16, 16)
    assert torch.equal(grey.with_channels(3).images[:, 2], grey.images[:, 0])
    assert colour.with_channels(1).channels == 1
    with pytest.raises(InputError, match="4 channels"):
        colour.with_channels(4)


def test_batches():
    splits = split_images(image_set(110), None, ("a",), valid_fraction=0.1)
    loaders = image_batches(splits, batch_size=16, seed=0)
    x, _ = (torch.cat(each) for each in zip(*loaders.train, strict=True))
    assert len(loaders.train) == 5
    assert x.shape == (80, 1, 8, 8)
    assert x.mean().abs() < 0.05
    assert (x.std() - 1).abs() < 0.05
    assert [len(y) for _, y in loaders.valid] == [11]
    first, second = (torch.cat([y for _, y in loaders.train]) for _ in range(2))
    assert not torch.equal(first, second)
    again = image_batches(splits, batch_size=16, seed=0)
    assert torch.equal(next(iter(again.train))[0], next(iter(image_batches(splits, 16, 0).train))[0])
    with pytest.raises(InputError, match="batch_size"):
        image_batches(splits, batch_size=0, seed=0)
