"""Labelled images for the command line, examples and benchmarks: from a reference to splits to batches.

The way of the data: `load_images("digits" or a path)` -> `ImageSet`s as stored -> `split_images` -> `Splits` ->
`image_batches` -> iterables of (x_BCHW, y_B). A library user brings own loaders instead.
"""

from stn_fx.data.batches import ImageBatches, Loaders, image_batches
from stn_fx.data.images import ImageSet, Splits, split_images
from stn_fx.data.sources import Source, load_images

__all__ = ["ImageBatches", "ImageSet", "Loaders", "Source", "Splits", "image_batches", "load_images", "split_images"]
