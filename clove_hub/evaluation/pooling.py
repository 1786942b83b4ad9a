"""One feature vector for each photo, by the preprocessing that the backbone was made for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from clove_hub.data.images import BrokenImage, read_image

from ..weights.backbone import Backbone
from .batching import batches, in_threads, normalized
from .processes import gather, share
from .reading import readable, settle, unless_broken

MOST_OBLONG = 16
"""Of a photo that is longer than this many times its width the middle alone is resized."""


class Pooled(NamedTuple):
    vectors: Tensor
    """float32 (N, C) on the CPU."""
    kept: list[int]
    """The numbers of the N photos that could be read."""
    left_out: tuple[tuple[str, str], ...]
    """The others, and why."""


def pooled_features(backbone: Backbone, data: Path, photos: list[Path], resize: int, crop: int, batch: int) -> Pooled:
    """The features of all photos that can be read, in every process.

    Args:
        data: the folder that the photos lie in, at any depth.
        resize: the shorter side of a photo becomes this many pixels, by the backbone's interpolation.
        crop: pixels a side of the central square that is seen then.
        batch: photos at once; the same with any number of processes.

    Raises:
        ValueError: too many of the photos cannot be read.
    """

    def load(path: Path) -> Tensor:
        seen = backbone.preprocessing
        image = central_square(Image.fromarray(read_image(path)), resize, crop, seen.interpolation)
        return normalized(image, seen.mean, seen.std)

    def own() -> Iterator[tuple[list[Tensor], list[BrokenImage | None]]]:
        for loaded in in_threads(unless_broken(load), share(batches(photos, batch))):
            pixels, problems = readable(loaded)
            yield [backbone.pooled(torch.stack(pixels)).float().cpu()] if pixels else [], problems

    parts = gather(own())
    problems = [problem for _, own_problems in parts for problem in own_problems]
    left_out = settle(problems, data)
    kept = [number for number, problem in enumerate(problems) if problem is None]
    return Pooled(torch.cat([vectors for part, _ in parts for vectors in part]), kept, left_out)


def central_square(image: Image.Image, resize: int, crop: int, interpolation: str) -> Image.Image:
    """The shorter side resized to `resize`, then the central `crop` x `crop` pixels, black where there are none."""
    longest = MOST_OBLONG * min(image.size)
    if max(image.size) > longest:  # resized whole, one row of pixels would fill the memory
        left, top = (max(side - longest, 0) // 2 for side in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    scale = resize / min(image.size)
    width, height = (max(resize, round(side * scale)) for side in image.size)
    kind = Image.Resampling[interpolation.upper()] if interpolation != "random" else Image.Resampling.BICUBIC
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    return image.resize((width, height), kind).crop((left, top, left + crop, top + crop))
