"""Loading images for the backbone: by threads, normalized, in batches, divided among the processes.

Those that cannot be read are left out, counted and named, up to a limit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clove_hub.data.images import BrokenImage, printable

from ..weights.backbone import Backbone
from .processes import gather, share, world
from .progress import tracked
from .unfinished import once

log = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")
V = TypeVar("V")
LeftOut = tuple[tuple[str, str], ...]
"""Name and reason of each image that could not be read."""

Square = Callable[[Image.Image, int, int, str], Image.Image]
"""A photo, the pixels of its short side and those of the square, and the interpolation -> what is seen."""

MOST_OBLONG = 16
"""Of a photo that is longer than this many times its width the middle alone is resized."""
_NAMED = 20


def normalized(image: Image.Image | NDArray[Any], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """An image (H, W, C), of which 255 is white, as (C, H, W), float32.

    Raises:
        ValueError: there is no mean for each band.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    if len(pixels) != len(mean):
        raise ValueError(
            f"the backbone takes images of {len(mean)} bands, but the evaluation reads photos, which have {len(pixels)}"
        )
    return (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def resized(image: NDArray[Any], resize: Callable[[Image.Image], Image.Image]) -> NDArray[Any]:
    """What Pillow makes of a photo, uint8 (H, W, 3); of other images, float32 (H, W, C), band by band."""
    if image.dtype == np.uint8:
        return np.asarray(resize(Image.fromarray(image)))
    bands = [np.asarray(resize(Image.fromarray(image[:, :, band]))) for band in range(image.shape[2])]
    return np.stack(bands, axis=2).clip(0, 255)


def batches(items: Sequence[T], size: int) -> list[list[T]]:
    """The items in their order, `size` at a time; the last batch has what is left."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def in_threads(load: Callable[[T], U], batches: Sequence[Sequence[T]]) -> Iterator[list[U]]:
    """Load the batches in order, each while the previous one is processed."""
    with ThreadPoolExecutor(4) as pool:
        coming = [pool.submit(load, item) for item in batches[0]] if batches else []
        for following in [*batches[1:], ()]:
            current, coming = coming, [pool.submit(load, item) for item in following]
            if current:
                yield [future.result() for future in current]


def each_readable(
    items: Sequence[T],
    load: Callable[[T], U],
    work: Callable[[list[U]], V],
    batch: int,
    data: Path | None = None,
    kept: Path | None = None,
) -> tuple[list[V], list[int], LeftOut]:
    """Apply `work` to the readable items of each batch, each in one process. All processes must call it, and get all.

    Args:
        batch: items at once; the same with any number of processes.
        data: the folder of the images, as in `settle`.
        kept: a folder for the results of `work`, stored by `once`, whose batches are not loaded again.

    Returns:
        What `work` has made of each batch with a readable item, the numbers of the readable items, and the others.

    Raises:
        ValueError: too many cannot be read.
    """

    def own() -> Iterator[tuple[list[V], list[BrokenImage | None]]]:
        units = [
            (part, kept and kept / f"{number:06d}") for number, part in share(list(enumerate(batches(items, batch))))
        ]
        todo = [part for part, path in units if not (path and path.exists())]
        loads = tracked(in_threads(unless_broken(load), todo), "reading the images", len(todo))

        def seen() -> tuple[list[V], list[tuple[str, str] | None]]:
            good, problems = readable(next(loads))
            return [work(good)] if good else [], [(one.name, one.reason) if one else None for one in problems]

        for _, path in units:
            results, problems = once(path, seen)
            yield results, [BrokenImage(*one) if one else None for one in problems]

    parts = gather(own())
    problems = [problem for _, own_problems in parts for problem in own_problems]
    left_out = settle(problems, data)
    whole = [number for number, problem in enumerate(problems) if problem is None]
    return [result for results, _ in parts for result in results], whole, left_out


def unless_broken(load: Callable[[T], U]) -> Callable[[T], U | BrokenImage]:
    """`load`, with a broken image returned instead of raised."""

    def attempt(item: T) -> U | BrokenImage:
        try:
            return load(item)
        except BrokenImage as error:
            return error

    return attempt


def readable(loaded: Sequence[T | BrokenImage]) -> tuple[list[T], list[BrokenImage | None]]:
    """The loaded items, and for each item why it could not be loaded."""
    good = [one for one in loaded if not isinstance(one, BrokenImage)]
    return good, [one if isinstance(one, BrokenImage) else None for one in loaded]


def settle(problems: Sequence[BrokenImage | None], data: Path | None = None, what: str = "images") -> LeftOut:
    """Name and reason of each image that could not be read, with a warning for each of the first ones.

    A tenth of the images may be broken; of a small set up to ten, but never more than half.

    Args:
        problems: for each image why it could not be read, or None. The same in every process.
        data: the folder that names are told relative to.
        what: is left out: the images, or the clips of which they are frames.

    Raises:
        ValueError: there are more, so the remaining images are a different data set.
    """
    above = "" if data is None else f"{printable(data)}/"
    left_out = tuple((one.name.removeprefix(above), one.reason) for one in problems if one is not None)
    count = len(problems)
    if len(left_out) > max(count // 10, min(10, count // 2)):
        first = "; ".join(f"{name}: {reason}" for name, reason in left_out[:3])
        where = "" if data is None else f" in {printable(data)}"
        raise ValueError(
            f"{len(left_out)} of {count} {what}{where} cannot be read, too many to leave out: {first}"
            f"{'; ...' if len(left_out) > 3 else ''}. `clove-hub check` with the folder lists all"
        )
    if left_out and world()[0] == 0:
        log.warning("%d of %d %s cannot be read and are left out:", len(left_out), count, what)
        for name, reason in left_out[:_NAMED]:
            log.warning("left out %s: %s", name, reason)
        if len(left_out) > _NAMED:
            log.warning("... and %d more, which the result names", len(left_out) - _NAMED)
    return left_out


# ---- whole images ----------------------------------------------------------------------------------------------------


def pooled_features(
    backbone: Backbone,
    data: Path,
    photos: list[Path],
    resize: int,
    crop: int,
    batch: int,
    square: Square | None = None,
    kept: Path | None = None,
) -> tuple[Tensor, list[int], LeftOut]:
    """One vector for each of the N photos that can be read, in every process: float32 (N, C) on the CPU.

    Args:
        data: the folder that the photos lie in, at any depth.
        resize: the shorter side of a photo becomes this many pixels, by the backbone's interpolation.
        crop: pixels a side of the central square that is seen then.
        batch: photos at once.
        square: makes what is seen of a photo; `central_square` if not given.
        kept: as in `each_readable`.

    Returns:
        The vectors, the numbers of the N photos, and the others.

    Raises:
        ValueError: too many of the photos cannot be read.
    """
    seen = backbone.preprocessing

    def load(path: Path) -> Tensor:
        levels = seen.reading.levels(path)
        image = resized(levels, lambda whole: (square or central_square)(whole, resize, crop, seen.interpolation))
        return normalized(image, seen.mean, seen.std)

    def work(pixels: list[Tensor]) -> Tensor:
        return backbone.pooled(torch.stack(pixels)).float().cpu()

    vectors, numbers, left_out = each_readable(photos, load, work, batch, data, kept)
    return torch.cat(vectors), numbers, left_out


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
