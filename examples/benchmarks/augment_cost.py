"""Time of all input augmentations together, beside torchvision v2 applied example by example.

    python examples/benchmarks/augment_cost.py     # both sizes, on CPU and on a GPU where there is one
    python examples/benchmarks/augment_cost.py --size 32 --out augment_cost.csv

The same per-example parameters are given to both. Each family stands beside the time that one read and one write of its
batch take (a copy), and all together beside a ResNet-18 training update with SGD on the same batch. kornia is timed for
the operations that it has batched, where it is installed. Medians of interleaved repetitions in one process.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as T
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stn_fx.augment import (
    Draws,
    ImageFormat,
    affine_maps,
    colour,
    cutout,
    draw_boxes,
    draw_centres,
    erase,
    gaussian_blur,
    gaussian_noise,
    input_dropout,
    input_scale,
    warp,
)

BATCHES = {32: 128, 224: 64}
RADIUS = 6
FORMAT = ImageFormat()


class Parameters:
    """Everything that the augmentations of a batch are given; drawn once, the same for all competitors."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        draws = self.draws = Draws(torch.Generator(x.device).manual_seed(0))

        def within(low: float, high: float) -> Tensor:
            return low + (high - low) * draws.uniform((len(x),), x, "")

        self.angle, self.scale = within(-30, 30), within(0.8, 1.25)
        self.right, self.down = within(-4, 4).round(), within(-4, 4).round()
        self.shear_x, self.shear_y = within(-10, 10), within(-10, 10)
        self.flip = within(0, 1) < 0.5
        self.sigma = within(0.1, 2)
        self.brightness, self.contrast, self.saturation = (within(0.6, 1.4) for _ in range(3))
        self.hue, self.strength = within(-0.2, 0.2), within(0, 0.2)
        half = torch.full((len(x),), 0.5, device=x.device)
        self.boxes = draw_boxes(x, half, half, draws, "")
        self.centres = draw_centres(x, 4, draws, "")
        self.holes, self.length = within(0, 4).round(), within(0, x.shape[-1] / 2).round()

    def rows(self) -> list[dict[str, float]]:
        """The parameters of each example as Python numbers, as torchvision takes them."""
        columns = {name: v.tolist() for name, v in vars(self).items() if isinstance(v, Tensor) and v.ndim == 1}
        boxes, centres = self.boxes.tolist(), self.centres.tolist()
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [row | {"box": b, "centres": c} for row, b, c in zip(rows, boxes, centres, strict=True)]


def geometry(x: Tensor, p: Parameters) -> Tensor:
    """Rotation, translation, scaling, shear and flip."""
    return warp(x, affine_maps(x, p.angle, p.right, p.down, p.scale, p.shear_x, p.shear_y, p.flip))


def blur(x: Tensor, p: Parameters) -> Tensor:
    """Gaussian blur."""
    return gaussian_blur(x, p.sigma, RADIUS)


def colours(x: Tensor, p: Parameters) -> Tensor:
    """Brightness, contrast, saturation and hue."""
    return colour(x, FORMAT, p.brightness, p.contrast, p.saturation, p.hue)


def noise(x: Tensor, p: Parameters) -> Tensor:
    """Input scale, Gaussian noise and input dropout, with their draws."""
    x = gaussian_noise(input_scale(x, p.strength, p.draws, "s"), p.strength, p.draws, "n")
    return input_dropout(x, p.strength, p.draws, "d")


def blanks(x: Tensor, p: Parameters) -> Tensor:
    """Random erasing and cutout."""
    return cutout(erase(x, p.boxes), p.holes, p.length, p.centres)


FAMILIES = {"geometry": geometry, "blur": blur, "colour": colours, "noise": noise, "blanks": blanks}


def ours(x: Tensor, p: Parameters) -> Tensor:
    """All families, one after the other."""
    for family in FAMILIES.values():
        x = family(x, p)
    return x


def _geometry(image: Tensor, row: dict) -> Tensor:
    image = T.horizontal_flip(image) if row["flip"] else image
    shear, shift = [row["shear_x"], row["shear_y"]], [row["right"], row["down"]]
    return T.affine(image, row["angle"], shift, row["scale"], shear, interpolation=T.InterpolationMode.BILINEAR)


def _blur(image: Tensor, row: dict) -> Tensor:
    return T.gaussian_blur(image, [2 * RADIUS + 1] * 2, row["sigma"])


def _colour(image: Tensor, row: dict) -> Tensor:
    image = T.adjust_contrast(T.adjust_brightness(image, row["brightness"]), row["contrast"])
    return T.adjust_hue(T.adjust_saturation(image, row["saturation"]), row["hue"])


def _noise(image: Tensor, row: dict) -> Tensor:
    image = T.gaussian_noise(image * (1 + row["strength"]), sigma=row["strength"], clip=False)
    return F.dropout(image, row["strength"])


def _blanks(image: Tensor, row: dict) -> Tensor:
    image = T.erase(image, *row["box"], v=torch.zeros((), device=image.device))
    half = int(row["length"]) // 2
    for y, x in row["centres"][: int(row["holes"])]:
        top, left = max(0, y - half), max(0, x - half)
        bottom, right = min(image.shape[-2], y + half), min(image.shape[-1], x + half)
        image = T.erase(image, top, left, bottom - top, right - left, v=torch.zeros((), device=image.device))
    return image


TORCHVISION = {"geometry": _geometry, "blur": _blur, "colour": _colour, "noise": _noise, "blanks": _blanks}


def one_by_one(x: Tensor, rows: list[dict], *names: str) -> Tensor:
    """Torchvision's functional transforms, image by image."""
    done = []
    for image, row in zip(x, rows, strict=True):
        for name in names:
            image = TORCHVISION[name](image, row)
        done.append(image)
    return torch.stack(done)


def kornia_calls(p: Parameters) -> dict[str, Callable[[], Tensor]]:
    """Kornia's batched operations where it is installed; it has none of cutout and takes one blur for each batch."""
    try:
        import kornia
    except ImportError:
        return {}
    enhance, x = kornia.enhance, p.x
    turn = 2 * torch.pi

    def colour_of_kornia() -> Tensor:
        y = enhance.adjust_contrast(enhance.adjust_brightness_accumulative(x, p.brightness), p.contrast)
        return enhance.adjust_hue(enhance.adjust_saturation(y, p.saturation), p.hue * turn)

    centre = torch.tensor([[(x.shape[3] - 1) / 2, (x.shape[2] - 1) / 2]], device=x.device).expand(len(x), 2)

    def affine_of_kornia() -> Tensor:
        shift = torch.stack((p.right, p.down), -1)
        matrix = kornia.geometry.get_affine_matrix2d(
            shift, centre, p.scale[:, None].expand(-1, 2), p.angle, torch.deg2rad(p.shear_x), torch.deg2rad(p.shear_y)
        )
        return kornia.geometry.warp_affine(x, matrix[:, :2], x.shape[2:])

    def blur_of_kornia() -> Tensor:
        size = (2 * RADIUS + 1, 2 * RADIUS + 1)
        return kornia.filters.gaussian_blur2d(x, size, p.sigma[:, None].expand(-1, 2))

    return {"geometry": affine_of_kornia, "colour": colour_of_kornia, "blur": blur_of_kornia}


def resnet_update(x: Tensor) -> Callable[[], None]:
    """One ordinary training update of ResNet-18."""
    model = torchvision.models.resnet18(num_classes=10).to(x.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    target = torch.zeros(len(x), dtype=torch.int64, device=x.device)

    def update() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    return update


def measure(calls: dict[str, Callable[[], object]], repetitions: int, device: str) -> dict[str, float]:
    """Median milliseconds of each, interleaved, after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if repetition:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def benchmark(size: int, device: str, repetitions: int, update: bool) -> list[dict[str, object]]:
    """Rows of the table of one size on one device."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(BATCHES[size], 3, size, size, generator=generator).to(device)
    p = Parameters(x)
    rows = p.rows()
    for name in ("geometry", "blur", "colour", "blanks"):
        difference = (FAMILIES[name](x, p) - one_by_one(x, rows, name)).abs().max().item()
        assert difference < 1e-3, f"{name} differs from torchvision by {difference}"
    calls: dict[str, Callable[[], object]] = {"copy": lambda: x.clone(), "all": lambda: ours(x, p)}
    calls |= {name: lambda f=family: f(x, p) for name, family in FAMILIES.items()}
    calls |= {f"torchvision {name}": lambda n=name: one_by_one(x, rows, n) for name in FAMILIES}
    calls["torchvision all"] = lambda: one_by_one(x, rows, *FAMILIES)
    calls |= {f"kornia {name}": call for name, call in kornia_calls(p).items()}
    if update:
        calls["update"] = resnet_update(x)
    milliseconds = measure(calls, repetitions, device)
    table = []
    for name in (*FAMILIES, "all"):
        ms = milliseconds[name]
        table.append(
            {
                "batch": f"{len(x)}x3x{size}x{size}",
                "device": device,
                "operation": name,
                "ms": ms,
                "copies": ms / milliseconds["copy"],
                "torchvision / ours": milliseconds[f"torchvision {name}"] / ms,
                "kornia / ours": milliseconds[f"kornia {name}"] / ms if f"kornia {name}" in milliseconds else None,
                "% of update": 100 * ms / milliseconds["update"] if update else None,
            }
        )
    return table


def main() -> None:
    """Measure, print, and write a file where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, choices=BATCHES, action="append", help="side in pixels; else both")
    parser.add_argument("--device", choices=("cpu", "cuda"), action="append", help="else all that are there")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--no-update", action="store_true", help="leave the ResNet-18 update out")
    parser.add_argument("--out", type=Path, help="a .csv file for the table")
    arguments = parser.parse_args()
    devices = arguments.device or ["cpu", *["cuda"] * torch.cuda.is_available()]
    rows = [
        row
        for device in devices
        for size in arguments.size or BATCHES
        for row in benchmark(size, device, arguments.repetitions, not arguments.no_update)
    ]
    table = Table(title=f"torch {torch.__version__}, {torch.get_num_threads()} threads", box=None)
    for column in rows[0]:
        table.add_column(column, justify="left" if column in ("batch", "device", "operation") else "right")
    for row in rows:
        table.add_row(*("-" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
    if arguments.out:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
