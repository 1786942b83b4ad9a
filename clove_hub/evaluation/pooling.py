"""One feature vector for each photo, by the preprocessing that the backbone was made for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clove_hub.data.images import read_photo

from ..weights.backbone import Backbone
from .batching import batches, in_threads, normalized
from .processes import gather, share


def pooled_features(backbone: Backbone, photos: list[Path], resize: int, crop: int, batch: int) -> Tensor:
    """float32 (N, C) on the CPU, for all photos in every process.

    Args:
        resize: the shorter side of a photo becomes this many pixels, by the backbone's interpolation.
        crop: pixels a side of the central square that is seen then.
        batch: photos at once; the same with any number of processes.
    """

    def load(path: Path) -> Tensor:
        seen = backbone.preprocessing
        image = central_square(read_photo(path), resize, crop, seen.interpolation)
        return normalized(image, seen.mean, seen.std)

    def own() -> Iterator[Tensor]:
        for pixels in in_threads(load, share(batches(photos, batch))):
            yield backbone.pooled(torch.stack(pixels)).float().cpu()

    return torch.cat(gather(own()))


def central_square(image: Image.Image, resize: int, crop: int, interpolation: str) -> Image.Image:
    """The shorter side resized to `resize`, then the central `crop` x `crop` pixels, black where there are none."""
    scale = resize / min(image.size)
    width, height = (max(resize, round(side * scale)) for side in image.size)
    kind = Image.Resampling[interpolation.upper()] if interpolation != "random" else Image.Resampling.BICUBIC
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    return image.resize((width, height), kind).crop((left, top, left + crop, top + crop))
