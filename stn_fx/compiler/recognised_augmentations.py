"""Which augmentation modules of kornia and torchvision.transforms do what entries of the catalogue do, at which values.

Recognised is what draws its numbers as the entries do, up to: the order of colour operations (the catalogue's, where a
module draws it), shifts in whole pixels, factors of a zoom (drawn by their logarithm here), erased rectangles that
reach over the border (cut off here, drawn again there), and the outermost pixels of rotated images (torchvision fades
them twice where it has a fill colour, also 0). A module with any other setting stays as it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchvision.transforms import InterpolationMode

LIBRARIES = ("kornia.augmentation", "torchvision.transforms")

Range = tuple[float, float]


@dataclass(frozen=True)
class Recognised:
    """Values of each catalogue entry, one for each of its components, and what of the module is not tuned.

    Attributes:
        entries: all of one family, in the catalogue's order.
        settings: for `gaussian_blur` the least standard deviation and the kernel's radius, for `random_erasing` the
            least area.
    """

    entries: dict[str, tuple[float, ...]]
    settings: tuple[float, ...] = ()


@dataclass(frozen=True)
class Other:
    """A module that does what these entries do, but with settings that they have no place for."""

    entries: tuple[str, ...]
    reason: str


class _NotExpressibleError(Exception):
    """The settings fit no value of an entry; the message says why."""


_COLOURS = ("brightness", "contrast", "saturation", "hue")
_MAPS = ("rotation", "translation", "scaling", "shear")
_ENTRIES = {
    "RandomHorizontalFlip": ("horizontal_flip",),
    "RandomRotation": ("rotation",),
    "RandomAffine": _MAPS,
    "RandomTranslate": ("translation",),
    "RandomShear": ("shear",),
    "ColorJitter": _COLOURS,
    "ColorJiggle": _COLOURS,
    "RandomBrightness": ("brightness",),
    "RandomContrast": ("contrast",),
    "RandomSaturation": ("saturation",),
    "RandomHue": ("hue",),
    "GaussianBlur": ("gaussian_blur",),
    "RandomGaussianBlur": ("gaussian_blur",),
    "GaussianNoise": ("gaussian_noise",),
    "RandomGaussianNoise": ("gaussian_noise",),
    "RandomErasing": ("random_erasing",),
    "RandomResizedCrop": ("scaling", "translation"),
}


def recognised(module: nn.Module) -> Recognised | Other | None:
    """What an augmentation that acts on each example for itself stands for; None for other modules."""
    library, kind = type(module).__module__, type(module).__name__
    if not library.startswith(LIBRARIES) or kind not in _ENTRIES:
        return None
    try:
        found = _of_kornia(module, kind) if library.startswith("kornia") else _of_torchvision(module, kind)
    except _NotExpressibleError as error:
        return Other(_ENTRIES[kind], str(error))
    if not found.entries:
        return Other(_ENTRIES[kind], "it is switched off")
    return found


def _of_torchvision(module: Any, kind: str) -> Recognised:
    if kind == "RandomHorizontalFlip":
        return Recognised({"horizontal_flip": (float(module.p),)})
    if kind in ("RandomRotation", "RandomAffine"):
        _require(module.interpolation == InterpolationMode.BILINEAR, "it does not interpolate (bilinear)")
        _require(module.fill in (0, None) and module.center is None, "it fills with another colour, or has a centre")
        _require(not getattr(module, "expand", False), "it enlarges the images")
        shift, shear = getattr(module, "translate", None), getattr(module, "shear", None)
        return _affine(
            module.degrees,
            None if shift is None else [(-each, each) for each in shift],
            getattr(module, "scale", None),
            None if shear is None else [shear[:2], shear[2:] or (0.0, 0.0)],
        )
    if kind == "ColorJitter":
        return _colours({name: getattr(module, name) for name in _COLOURS})
    if kind == "GaussianBlur":
        return _blur(module.sigma, module.kernel_size)
    if kind == "GaussianNoise":
        _require(module.mean == 0 and not module.clip, "its noise has a mean, or is clipped")
        return _positive("gaussian_noise", float(module.sigma))
    if kind == "RandomErasing":
        value = module.value if isinstance(module.value, Sequence) else [module.value]
        _require(all(each == 0 for each in value), "it fills with something other than 0")
        _require(
            math.isclose(module.ratio[0], 0.3, rel_tol=0.02) and math.isclose(module.ratio[1], 10 / 3, rel_tol=0.02),
            f"its aspects are {tuple(module.ratio)}, and those of the entry 0.3 to 3.3",
        )
        low, high = (float(each) for each in module.scale)
        return Recognised({"random_erasing": (float(module.p), high)} if module.p else {}, (low,))
    raise _NotExpressibleError("it changes the size of images and their aspect")


def _of_kornia(module: Any, kind: str) -> Recognised:
    _require(module.p_batch == 1.0 and not module.same_on_batch, "it draws once for a whole batch")
    if kind == "RandomHorizontalFlip":
        return Recognised({"horizontal_flip": (float(module.p),)})
    _require(kind != "RandomErasing", "its aspects are not log-uniform")
    _require(module.p == 1.0, f"it acts with probability {module.p:g}, and the entry has none")
    numbers, flags = module._param_generator, module.flags
    if kind in ("RandomRotation", "RandomAffine", "RandomTranslate", "RandomShear"):
        _require(str(flags["resample"]).endswith("BILINEAR"), "it does not interpolate (bilinear)")
        _require(
            str(flags.get("padding_mode", "ZEROS")).endswith("ZEROS") and flags.get("fill_value") is None,
            "it fills with something other than 0",
        )
        _require(getattr(numbers, "scale_4_sampler", None) is None, "it scales each axis by a factor of its own")
        degrees = numbers.degrees.flatten().tolist() if kind == "RandomRotation" else _drawn(numbers, "degree")
        shift = [_drawn(numbers, f"translate_{axis}") for axis in "xy"]
        return _affine(degrees, shift, _drawn(numbers, "scale_2"), [_drawn(numbers, f"shear_{axis}") for axis in "xy"])
    if kind == "ColorJitter":
        order = module._fixed_order
        _require(order is None or list(order) == sorted(order), f"its order is {order}")
        acting = _COLOURS if order is None else [_COLOURS[each] for each in order]
        return _colours({name: _drawn(numbers, name) for name in acting})
    if kind == "RandomHue":
        return _colours({"hue": tuple(module.hue.tolist())})
    if kind == "RandomGaussianBlur":
        _require(str(flags["border_type"]).endswith("REFLECT"), "its border is not reflected")
        return _blur(_drawn(numbers, "sigma"), flags["kernel_size"])
    if kind == "RandomGaussianNoise":
        _require(numbers.mean == 0, "its noise has a mean")
        return _positive("gaussian_noise", float(numbers.std))
    raise _NotExpressibleError(_DIFFERENT.get(kind, "it changes the size of images and their aspect"))


_DIFFERENT = {
    "ColorJiggle": "it adds to the brightness and multiplies pixels for contrast; ColorJitter does as the entries do",
    "RandomBrightness": "it adds to the pixels, and the entry multiplies them",
    "RandomContrast": "it multiplies the pixels, which is what the entry brightness does",
    "RandomSaturation": "it multiplies the saturation of HSV, and the entry blends with grey",
}


def _drawn(numbers: Any, name: str) -> Range | None:
    """The range of one of kornia's samplers; None where there is none."""
    sampler = getattr(numbers, f"{name}_sampler", None)
    return None if sampler is None else (float(sampler.low), float(sampler.high))


def _affine(
    degrees: Sequence[float] | None,
    shifts: Sequence[Range | None] | None,
    scale: Sequence[float] | None,
    shears: Sequence[Sequence[float] | None] | None,
) -> Recognised:
    """Ranges of the rotation, the shift along x and y, the factor of the zoom, and the shear along x and y."""
    if scale is not None:
        _require(math.isclose(scale[0] * scale[1], 1, rel_tol=1e-3), f"it scales by {tuple(scale)}, not by 1/s to s")
    strengths = {
        "rotation": _strength(degrees),
        "translation": _on_both("shifts", shifts),
        "scaling": 0.0 if scale is None else math.log(scale[1]),
        "shear": _on_both("shears", shears),
    }
    return Recognised({name: (value,) for name, value in strengths.items() if value})


def _on_both(verb: str, ranges: Sequence[Sequence[float] | None] | None) -> float:
    x, y = (_strength(each) for each in ranges or (None, None))
    _require(math.isclose(x, y, rel_tol=1e-5), f"it {verb} by other amounts along x ({x:g}) than along y ({y:g})")
    return x


def _colours(ranges: dict[str, Range | None]) -> Recognised:
    strengths = {name: _strength(each, 0.0 if name == "hue" else 1.0) for name, each in ranges.items()}
    return Recognised({name: (value,) for name, value in strengths.items() if value})


def _blur(sigma: Sequence[float] | None, kernel: int | Sequence[int]) -> Recognised:
    sizes = {kernel} if isinstance(kernel, int) else set(kernel)
    _require(len(sizes) == 1 and sigma is not None, "its kernel is not square")
    assert sigma is not None, "asked for before"
    low, high = (float(each) for each in sigma)
    return Recognised({"gaussian_blur": (high,)}, (low, max(sizes) // 2))


def _positive(entry: str, value: float) -> Recognised:
    return Recognised({entry: (value,)} if value else {})


def _strength(ends: Sequence[float] | None, centre: float = 0.0) -> float:
    """Half the width of a range that lies evenly around `centre`; 0 for none."""
    if ends is None:
        return 0.0
    low, high = (float(each) for each in ends)
    _require(
        math.isclose(high - centre, centre - low, rel_tol=1e-5, abs_tol=1e-6),
        f"its range {low:g} to {high:g} does not lie evenly around {centre:g}",
    )
    return round(high - centre, 6)


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise _NotExpressibleError(reason)
