"""Image augmentations against torchvision's functional transforms, example by example."""

import pytest
import torch
import torchvision.transforms.v2.functional as T

from stn_fx.augment import (
    Draws,
    ImageFormat,
    affine_maps,
    colour,
    draw_affine,
    draw_boxes,
    draw_colour,
    draw_sigma,
    erase,
    gaussian_blur,
    gaussian_noise,
    horizontal_flip,
    input_scale,
    warp,
)
from stn_fx.errors import InputError

PLAIN = ImageFormat()
SHAPES = [(5, 3, 32, 32), (4, 1, 17, 31), (1, 3, 9, 4), (3, 3, 1, 5)]
IMAGENET = ImageFormat((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def draws(seed=0):
    return Draws(torch.Generator().manual_seed(seed))


def pictures(shape, dtype=torch.float32, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def each(x, function, *values_B):
    rows = [function(x[i : i + 1], *(float(value[i]) for value in values_B)) for i in range(len(x))]
    return torch.cat(rows) if rows else x


def between(low, high, x, seed=1):
    return low + (high - low) * torch.rand(len(x), generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


# ---- against torchvision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colour_is_torchvisions(name, shape, dtype):
    x = pictures(shape, dtype)
    if shape[1] == 1 and name in ("saturation", "hue"):
        with pytest.raises(InputError, match=f"{name} needs images with 3 channels"):
            colour(x, PLAIN, **{name: torch.ones(len(x))})
        return
    value_B = between(-0.5, 0.5, x) if name == "hue" else between(0, 2, x)
    assert_same(colour(x, PLAIN, **{name: value_B}), each(x, getattr(T, f"adjust_{name}"), value_B))
    same = torch.full((len(x),), 0.3, dtype=dtype)
    assert_same(colour(x, PLAIN, **{name: same}), getattr(T, f"adjust_{name}")(x, 0.3))


def test_colour_in_its_order_on_normalised_images():
    x = pictures((40, 3, 33, 31))
    brightness, contrast, saturation, hue = (between(*r, x, i) for i, r in enumerate([(0, 2)] * 3 + [(-0.5, 0.5)]))

    def one(pixels, b, c, s, h):
        return T.adjust_hue(T.adjust_saturation(T.adjust_contrast(T.adjust_brightness(pixels, b), c), s), h)

    expected = T.normalize(
        each(x, one, brightness, contrast, saturation, hue), list(IMAGENET.means), list(IMAGENET.stds)
    )
    actual = colour(
        T.normalize(x, list(IMAGENET.means), list(IMAGENET.stds)), IMAGENET, brightness, contrast, saturation, hue
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5)  # divided by a std of 0.22


def test_hue_of_grey_and_saturated_pixels():
    levels = torch.linspace(0, 1, 5)
    x = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 25, 5)
    for shift in (-0.5, -1 / 3, -0.1, 1 / 6, 0.25, 0.5):
        assert_same(colour(x, PLAIN, hue=torch.tensor([shift])), T.adjust_hue(x, shift))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_affine_is_torchvisions(shape, dtype):
    x = pictures(shape, dtype)
    angle, scale = between(-90, 90, x, 1), between(0.5, 2, x, 2)
    right, down = between(-5, 5, x, 3).round(), between(-5, 5, x, 4).round()
    shear_x, shear_y = between(-40, 40, x, 5), between(-40, 40, x, 6)

    def one(image, a, r, d, s, sx, sy):
        return T.affine(image, a, [r, d], s, [sx, sy], interpolation=T.InterpolationMode.BILINEAR)

    actual = warp(x, affine_maps(x, angle, right, down, scale, shear_x, shear_y))
    assert_same(actual, each(x, one, angle, right, down, scale, shear_x, shear_y))
    rotated = warp(x, affine_maps(x, angle_B=torch.full_like(angle, 20)))
    assert_same(rotated, T.affine(x, 20, [0, 0], 1.0, [0, 0], interpolation=T.InterpolationMode.BILINEAR))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_maps_and_deviations_may_have_another_precision(dtype):
    x = pictures((3, 3, 20, 20), dtype)
    value_B = torch.tensor([0.3, 0.0, 1.2])
    for other in (torch.float32, torch.float64):
        moved = warp(x, affine_maps(x, angle_B=value_B * 30).to(other))
        assert moved.dtype == dtype
        assert [torch.equal(a, b) for a, b in zip(moved, x, strict=True)] == [False, True, False]
        assert gaussian_blur(x, value_B.to(other), 2).dtype == dtype


def test_a_flip_comes_before_the_other_maps():
    x = pictures((4, 3, 9, 12))
    flip_B, angle_B = torch.tensor([True, False, True, False]), between(-90, 90, x)
    flipped = torch.where(flip_B.reshape(-1, 1, 1, 1), T.horizontal_flip(x), x)
    assert_same(warp(x, affine_maps(x, flip_B=flip_B)), flipped)
    assert_same(warp(x, affine_maps(x, angle_B, flip_B=flip_B)), warp(flipped, affine_maps(x, angle_B)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "radius"),
    [((5, 3, 32, 32), 6), ((4, 1, 17, 31), 16), ((2, 3, 4, 9), 1), ((2, 3, 70, 131), 9), ((1, 1, 67, 20), 2)],
)
def test_blur_is_torchvisions(shape, radius, dtype):
    x = pictures(shape, dtype)
    sigma_B = between(0.1, 3, x)
    size = 2 * radius + 1
    assert_same(gaussian_blur(x, sigma_B, radius), each(x, lambda i, s: T.gaussian_blur(i, [size, size], s), sigma_B))
    assert_same(gaussian_blur(x, torch.full((len(x),), 0.7), radius), T.gaussian_blur(x, [size, size], 0.7))


def test_images_in_pieces_are_what_each_is_alone(monkeypatch):
    monkeypatch.setattr("stn_fx.augment.images.CACHED", 1)  # an image for each thread at a time
    x = pictures((5, 3, 130, 90))
    angle_B, sigma_B, factor_B = between(-90, 90, x), between(0.1, 2, x), between(0.5, 1.5, x)
    angle_B[1] = sigma_B[1] = 0
    moved, blurred = warp(x, affine_maps(x, angle_B)), gaussian_blur(x, sigma_B, 6)
    recoloured = colour(x, PLAIN, contrast=factor_B)
    for i in range(5):
        one, at = x[i : i + 1], slice(i, i + 1)
        assert_same(moved[at], warp(one, affine_maps(one, angle_B[at])))
        assert_same(blurred[at], T.gaussian_blur(one, [13, 13], float(sigma_B[i])) if i != 1 else one)
        assert_same(recoloured[at], T.adjust_contrast(one, float(factor_B[i])))
    assert torch.equal(moved[1], x[1])
    assert torch.equal(blurred[1], x[1])


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (9, 3, 200, 200)])
def test_gradients_reach_the_images(shape):
    x = pictures(shape, torch.float64).requires_grad_()
    for y in (warp(x, affine_maps(x, between(-90, 90, x))), gaussian_blur(x, between(0.5, 2, x), 3)):
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient[0].abs().sum() > 0
        assert gradient[-1].abs().sum() > 0


def test_erase_is_torchvisions():
    x = pictures((64, 3, 17, 31))
    boxes_B4 = draw_boxes(x, torch.full((64,), 0.7), torch.full((64,), 0.5), draws(), "e")
    expected = [T.erase(x[i], *map(int, boxes_B4[i]), v=torch.zeros(())) for i in range(64)]
    assert torch.equal(erase(x, boxes_B4), torch.stack(expected))


# ---- identity, shapes, dtypes


def everything(x, strength, source=None):
    """All of them, one after the other, with the same strength for each."""
    source = source or draws()
    value_B = torch.full((len(x),), strength, dtype=x.dtype)
    geometry = ("rotation", "translation", "scaling", "shear", "horizontal_flip")
    colours = ("brightness", "contrast", "saturation", "hue")[: 4 if x.shape[1] == 3 else 2]
    x = warp(x, draw_affine(x, dict.fromkeys(geometry, value_B), source, "g"))
    x = gaussian_blur(x, draw_sigma(x, value_B, source, "b"), 3)
    x = colour(x, PLAIN, **draw_colour(x, dict.fromkeys(colours, value_B), source, "c"))
    x = input_scale(gaussian_noise(x, value_B, source, "n"), value_B, source, "s")
    return erase(horizontal_flip(x, value_B, source, "h"), draw_boxes(x, value_B, value_B, source, "e"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (1, 1, 1, 1), (1, 3, 5, 7), (9, 3, 16, 11), (6, 1, 7, 8)])
def test_any_shape_and_dtype_and_strength_zero_is_the_identity(shape, dtype):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    for off in (0.0, 1e-22):
        assert torch.equal(everything(x, off), x)
    changed = everything(x, 0.4)
    assert changed.shape == x.shape
    assert changed.dtype == dtype
    assert torch.isfinite(changed).all()


def test_bfloat16_is_computed_in_float32():
    x = pictures((4, 3, 40, 40)).bfloat16()
    angle_B, factor_B = torch.full((4,), 30.0), torch.full((4,), 1.3)
    exact = warp(x.float(), affine_maps(x.float(), angle_B))
    assert torch.equal(warp(x, affine_maps(x, angle_B)), exact.bfloat16())
    exact = colour(x.float(), PLAIN, contrast=factor_B, hue=factor_B / 10)
    assert torch.equal(colour(x, PLAIN, contrast=factor_B, hue=factor_B / 10), exact.bfloat16())


def test_the_draws_are_the_only_randomness():
    x = pictures((6, 3, 8, 8))
    assert torch.equal(everything(x, 0.3, draws(1)), everything(x, 0.3, draws(1)))
    assert not torch.equal(everything(x, 0.3, draws(1)), everything(x, 0.3, draws(2)))


def test_examples_do_not_touch_each_other():
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    strength_B = torch.zeros(5)
    strength_B[2] = 0.5
    strengths = dict.fromkeys(("rotation", "translation", "scaling", "shear", "horizontal_flip"), strength_B)
    moved = warp(x, draw_affine(x, strengths, draws(), "g"))
    recoloured = colour(x, PLAIN, **draw_colour(x, dict.fromkeys(("brightness", "hue"), strength_B), draws(), "c"))
    blurred = gaussian_blur(x, strength_B, 2)
    for y in (moved, recoloured, blurred, gaussian_noise(x, strength_B, draws(), "n")):
        assert [i for i in range(5) if not torch.equal(y[i], x[i])] == [2]


# ---- statistics of unequal strengths

MANY = 40_000


def halves(low, high):
    return torch.cat([torch.full((MANY // 2,), low), torch.full((MANY // 2,), high)])


@pytest.mark.parametrize(("key", "low", "high"), [("brightness", 0.1, 0.6), ("hue", 0.02, 0.3)])
def test_colour_factors_are_uniform_within_each_strength(key, low, high):
    x = torch.zeros(1, 3, 1, 1).expand(MANY, 3, 1, 1)
    value_B = draw_colour(x, {key: halves(low, high)}, draws(), "c")[key] - (0 if key == "hue" else 1)
    for part, strength in zip(value_B.split(MANY // 2), (low, high), strict=True):
        assert part.abs().max() <= strength
        assert abs(part.mean()) < 5 * strength / (3 * MANY / 2) ** 0.5
        assert abs(part.abs().mean() - strength / 2) < 5 * strength / (12 * MANY / 2) ** 0.5


def test_affine_maps_stay_within_their_strengths():
    x = torch.zeros(1, 1, 10, 20).expand(MANY, 1, 10, 20)
    maps = draw_affine(x, {"rotation": halves(5.0, 90.0)}, draws(), "g")
    angle = torch.rad2deg(torch.atan2(maps[:, 0, 1], maps[:, 0, 0]))
    for part, strength in zip(angle.split(MANY // 2), (5.0, 90.0), strict=True):
        assert part.abs().max() <= strength * 1.0001
        assert abs(part.abs().mean() - strength / 2) < 5 * strength / (12 * MANY / 2) ** 0.5
    maps = draw_affine(x, {"translation": halves(0.1, 0.5), "scaling": halves(0.05, 0.7)}, draws(), "g")
    scale = 1 / maps[:, 0, 0]
    assert 0.5**0.5 < scale[: MANY // 2].log().abs().mean() / 0.05 * 2**0.5 < 1
    right = maps[:, 0, 2] * scale
    for part, strength in zip(right.split(MANY // 2), (2.0, 10.0), strict=True):
        assert strength * 0.99 < part.abs().max() <= strength * 1.0001


def test_flips_noise_and_scale_have_their_rates():
    x = torch.arange(2.0).expand(MANY, 1, 1, 2)
    flipped = horizontal_flip(x, halves(0.1, 0.7), draws(), "h")[:, 0, 0, 0]
    maps = draw_affine(x, {"horizontal_flip": halves(0.1, 0.7)}, draws(), "h")
    for found in (flipped, (maps[:, 0, 0] < 0).float()):
        for part, rate in zip(found.split(MANY // 2), (0.1, 0.7), strict=True):
            assert abs(part.mean() - rate) < 5 * (rate * (1 - rate) / (MANY / 2)) ** 0.5
    noise = gaussian_noise(torch.zeros(2, MANY), torch.tensor([0.1, 2.0]), draws(), "n")
    assert noise.std(1).tolist() == pytest.approx([0.1, 2.0], rel=0.03)
    factor = input_scale(torch.ones(MANY, 1), halves(0.1, 0.8), draws(), "s") - 1
    assert factor[: MANY // 2].abs().max() <= 0.1
    assert 0.39 < factor[MANY // 2 :].abs().mean() < 0.41


def test_erased_rectangles_have_their_rate_and_area():
    x = torch.zeros(1, 1, 100, 100).expand(MANY, 1, 100, 100)
    boxes = draw_boxes(x, halves(0.2, 0.9), torch.full((MANY,), 0.1), draws(), "e").long()
    top, left, height, width = boxes.unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 100).all()
    assert (left + width <= 100).all()
    for part, rate in zip((height * width > 0).float().split(MANY // 2), (0.2, 0.9), strict=True):
        assert abs(part.mean() - rate) < 0.02  # the smallest rectangles round to none
    area = (height * width)[MANY // 2 :].double()
    assert area[area > 0].mean().item() == pytest.approx(0.05 * 100 * 100, rel=0.03)
    assert left[MANY // 2 :].double().mean().item() == pytest.approx(top[MANY // 2 :].double().mean().item(), rel=0.03)


# ---- mistakes


def test_mistakes():
    x = pictures((2, 3, 8, 8))
    with pytest.raises(InputError, match=r"\(B, C, H, W\)"):
        warp(x[0], affine_maps(x))
    with pytest.raises(InputError, match="for 2 examples"):
        colour(x, PLAIN, hue=torch.zeros(3))
    with pytest.raises(InputError, match="describes 3 channels"):
        colour(x[:, :1], IMAGENET, brightness=torch.ones(2))
    with pytest.raises(InputError, match="1 or 3 channels"):
        colour(x[:, :2], PLAIN, contrast=torch.ones(2))
    with pytest.raises(InputError, match="must be positive"):
        ImageFormat(0.5, 0)
    with pytest.raises(InputError, match="2 means and 3"):
        ImageFormat((0.5, 0.5), (1, 1, 1))
    with pytest.raises(InputError, match="for 2 images"):
        erase(x, torch.zeros(3, 4))
    with pytest.raises(InputError, match="negative"):
        gaussian_blur(x, torch.ones(2), -1)


def test_without_waiting_for_the_device():
    """Tensors without values refuse to tell them, as a GPU does without waiting."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        everything(torch.rand(4, 3, 8, 8), 0.3, Draws())
    with torch.device("meta"):
        everything(torch.rand(4, 3, 8, 8), 0.3, Draws())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_cuda_without_synchronising():
    x = pictures((8, 3, 33, 31)).cuda()
    source = Draws(torch.Generator("cuda").manual_seed(0))
    everything(x, 0.3, source)
    strength = torch.full((8,), 0.3, device="cuda")
    assert strength.is_cuda
    torch.cuda.set_sync_debug_mode("error")
    try:
        maps = draw_affine(x, {"rotation": strength * 30, "horizontal_flip": strength}, source, "g")
        factors = draw_colour(x, {"brightness": strength, "hue": strength, "contrast": strength}, source, "c")
        results = [
            warp(x, maps),
            colour(x, IMAGENET, **factors),
            gaussian_blur(x, strength, 3),
            erase(x, draw_boxes(x, strength, strength, source, "e")),
            gaussian_noise(x, strength, source, "n"),
            input_scale(x, strength, source, "s"),
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    cpu = {name: value.cpu() for name, value in factors.items()}
    assert_same(results[0].cpu(), warp(x.cpu(), maps.cpu()))
    torch.testing.assert_close(results[1].cpu(), colour(x.cpu(), IMAGENET, **cpu), rtol=0, atol=5e-5)
    torch.testing.assert_close(results[2].cpu(), gaussian_blur(x.cpu(), strength.cpu(), 3), rtol=0, atol=1e-3)


def test_colours_of_images_that_require_a_gradient():
    x = torch.rand(2, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    factor = torch.tensor([1.1, 1.0], dtype=torch.float64)

    def changed(x):
        return colour(x, PLAIN, brightness=factor, contrast=factor, saturation=factor, hue=factor - 1)

    assert torch.autograd.gradcheck(changed, (x.requires_grad_(),))
