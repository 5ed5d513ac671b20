"""Cutout against the authors' published code, example by example."""

import numpy as np
import pytest
import torch

from stn_fx.augment import Draws, ReplayDraws, cutout, draw_centres
from stn_fx.errors import InputError


def published(image, n_holes, length, centres):
    """`Cutout.__call__` of github.com/uoguelph-mlrg/Cutout (util/cutout.py), with the centres given."""
    h, w = image.shape[1:]
    mask = np.ones((h, w), np.float32)
    for y, x in centres[:n_holes]:
        y1 = np.clip(y - length // 2, 0, h)
        y2 = np.clip(y + length // 2, 0, h)
        x1 = np.clip(x - length // 2, 0, w)
        x2 = np.clip(x + length // 2, 0, w)
        mask[y1:y2, x1:x2] = 0.0
    return image * torch.from_numpy(mask).to(image.dtype)


def random_case(shape, dtype=torch.float32, max_holes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    holes = torch.randint(0, max_holes + 1, shape[:1], generator=generator).to(dtype)
    length = torch.randint(0, max(shape[2:]) + 3, shape[:1], generator=generator).to(dtype)
    return x, holes, length, draw_centres(x, max_holes, Draws(generator), "cutout")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (33, 1, 28, 28), (20, 3, 17, 31), (5, 2, 1, 3), (1, 3, 8, 8)])
def test_equals_the_published_code(shape, dtype):
    x, holes, length, centres = random_case(shape, dtype)
    result = cutout(x, holes, length, centres)
    assert result.dtype == dtype
    for i in range(len(x)):
        expected = published(x[i], int(holes[i]), int(length[i]), centres[i].tolist())
        assert torch.equal(result[i], expected)


def test_large_images_in_low_precision():
    """bfloat16 does not hold every pixel position above 256: positions must not be computed in it."""
    x = torch.ones(1, 1, 600, 600, dtype=torch.bfloat16)
    centres = torch.tensor([[[511, 301]]], dtype=torch.int32)
    result = cutout(x, torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 6.0, dtype=torch.bfloat16), centres)
    assert torch.equal(result[0], published(x[0], 1, 6, [(511, 301)]))


def test_no_holes_or_no_length_changes_nothing():
    x, holes, length, centres = random_case((8, 3, 9, 9))
    assert torch.equal(cutout(x, torch.zeros(8), length, centres), x)
    assert torch.equal(cutout(x, holes, torch.zeros(8), centres), x)
    assert torch.equal(cutout(x, holes, length, draw_centres(x, 0, Draws(), "c")), x)


def test_empty_batch():
    x = torch.zeros(0, 3, 8, 8)
    centres = draw_centres(x, 4, Draws(), "c")
    assert centres.shape == (0, 4, 2)
    assert cutout(x, torch.zeros(0), torch.zeros(0), centres).shape == x.shape


def test_every_pixel_is_as_often_a_centre():
    x = torch.zeros(20_000, 1, 3, 5)
    centres = draw_centres(x, 2, Draws(torch.Generator().manual_seed(0)), "c").long()
    index = (centres[..., 0] * 5 + centres[..., 1]).flatten()
    counts = torch.bincount(index, minlength=15).double()
    expected = index.numel() / 15
    # Chi-squared with 14 degrees of freedom exceeds 36.1 once in a thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 36.1


def test_centres_stay_inside_at_the_end_of_the_interval():
    class Highest(Draws):
        def uniform(self, shape, like, name):
            return torch.full(tuple(shape), 1 - 2**-24)

    for height, width in ((1, 2), (1000, 777), (1024, 3), (4097, 65535)):
        x = torch.zeros(1, 1, 1, 1).expand(1, 1, height, width)
        assert draw_centres(x, 1, Highest(), "c").tolist() == [[[height - 1, width - 1]]]


def test_draws_are_the_only_randomness_and_gradients_follow_the_mask():
    x, holes, length, _ = random_case((4, 1, 8, 8))
    replay = ReplayDraws(torch.Generator().manual_seed(0))
    first, second = (cutout(x, holes, length, draw_centres(x, 4, replay, "c")) for _ in range(2))
    assert torch.equal(first, second)
    x.requires_grad_()
    y = cutout(x, holes, length, draw_centres(x, 4, replay, "c"))
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0).float())


def test_mistakes():
    with pytest.raises(InputError, match=r"\(B, C, H, W\)"):
        draw_centres(torch.zeros(3, 4), 1, Draws(), "c")
    x, holes, length, centres = random_case((4, 1, 8, 8))
    with pytest.raises(InputError, match="each of 4 images"):
        cutout(x, holes[:2], length, centres)
    with pytest.raises(InputError, match="each of 4 images"):
        cutout(x, holes, length, centres[:1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_cuda_without_synchronising():
    x, holes, length, centres = (tensor.cuda() for tensor in random_case((8, 3, 32, 32)))
    source = Draws(torch.Generator("cuda").manual_seed(0))
    draw_centres(x, 4, source, "c")
    cutout(x, holes, length, centres)
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw_centres(x, 4, source, "c")
        result = cutout(x, holes, length, centres)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = cutout(x.cpu(), holes.cpu(), length.cpu(), centres.cpu())
    assert torch.equal(result.cpu(), expected)
