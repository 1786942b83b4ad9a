"""Photos as the figures show them, and their feature maps."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image as PillowImage
from torch import Tensor

from clove_hub.command import user_path
from clove_hub.data.files import spread
from clove_hub.data.finder import some_images
from clove_hub.data.images import read_image
from clove_hub.evaluation.reading import central_square, each_readable, normalized
from clove_hub.weights import SOURCE
from clove_hub.weights.backbone import PAD, Backbone

from .style import Image

log = logging.getLogger(__name__)

T = TypeVar("T")

Point = tuple[float, float]
"""Across and down, as fractions of a photo."""


def add_photo_arguments(parser: argparse.ArgumentParser, photos: int, size: int | None = None) -> None:
    """--data, --photos and, where there is a default for it, --size."""
    parser.add_argument(
        "--data", required=True, nargs="+", type=user_path, metavar="PATH", help="photos, or folders of them"
    )
    parser.add_argument(
        "--photos", type=int, default=photos, help=f"of those in --data, spread evenly (default: {photos})"
    )
    if size:
        said = f"pixels a side of a photo's central square, which is seen (default: {size})"
        parser.add_argument("--size", type=int, default=size, help=said)


def add_model_arguments(parser: argparse.ArgumentParser, **several: Any) -> None:
    """--model, --seed and --level; `several` is how there may be more than one model."""
    parser.add_argument("--model", required=True, metavar="SOURCE", help=SOURCE, **several)
    parser.add_argument("--level", type=int, default=-1, help="of the feature maps, -1 the last (default: -1)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights of random: (default: 0)")


def add_protocol_arguments(parser: argparse.ArgumentParser, data: str, example: str) -> None:
    """--model, --data, --seed and settings, as the kinds that show a protocol have them."""
    parser.add_argument("--model", required=True, metavar="SOURCE", help=SOURCE)
    parser.add_argument("--data", required=True, type=user_path, metavar="DIR", help=data)
    parser.add_argument("--seed", type=int, default=0, help="of all that is random, as in random: (default: 0)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help=f"settings of the protocol, such as {example}")


def found_photos(paths: Sequence[Path], limit: int) -> list[Path]:
    """The photos themselves and those in the folders; at most `limit`, spread evenly.

    Raises:
        ValueError: there is no such file or folder, it holds no photo, or the limit is below one.
    """
    if limit < 1:
        raise ValueError(f"--photos is {limit}; expected at least 1")
    photos: list[Path] = []
    for path in paths:
        if path.is_file():
            photos.append(path)
        else:
            found = some_images(path)
            log.info("%s: %s", path, found.tally)
            photos += found.paths
    return spread(photos, limit)


def read_each(photos: Sequence[Path], read: Callable[[Path], T]) -> list[tuple[Path, T]]:
    """Each photo with what `read` makes of it; those that cannot be read are left out with a warning, up to a limit.

    Raises:
        ValueError: too many cannot be read.
    """
    images, kept, _ = each_readable(photos, read, lambda loaded: loaded[0], 1)
    return [(photos[number], image) for number, image in zip(kept, images, strict=True)]


def read_squares(options: argparse.Namespace) -> list[tuple[Path, PillowImage.Image]]:
    """The photos that are drawn: of each the middle, as large as fits in it, at --size pixels a side.

    Raises:
        ValueError: there are no photos, --photos or --size is out of range, or too many cannot be read.
    """
    if options.size < PAD or options.size % PAD:
        raise ValueError(f"--size is {options.size}; expected a multiple of {PAD}, so that cells are whole pixels")
    return read_each(found_photos(options.data, options.photos), lambda photo: square(photo, options.size))


def square(photo: Path, size: int, shorter: int | None = None, interpolation: str = "bicubic") -> PillowImage.Image:
    """The middle of a photo at `size` pixels a side: as large as fits in it, or of its `shorter` side in pixels."""
    return central_square(PillowImage.fromarray(read_image(photo)), shorter or size, size, interpolation)


def seen(backbone: Backbone, image: PillowImage.Image, level: int) -> Tensor:
    """The feature map of one level of a photo: (C, h, w)."""
    how = backbone.preprocessing
    with torch.no_grad():
        return backbone.maps(normalized(image, how.mean, how.std)[None], (level,))[0][0].float()


def read_point(text: str) -> Point:
    """`0.3,0.7` -> (0.3, 0.7).

    Raises:
        argparse.ArgumentTypeError: it is no point of a photo.
    """
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no point; expected two fractions, as in 0.3,0.7") from None
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise argparse.ArgumentTypeError(f"{text!r} lies outside the photo; both fractions go from 0 to 1")
    return x, y


def cell_of(point: Point, height: int, width: int) -> tuple[int, int]:
    """Row and column of the cell that shows a point."""
    return min(int(point[1] * height), height - 1), min(int(point[0] * width), width - 1)


def middle_of(cell: tuple[int, int], height: int, width: int) -> Point:
    """The point in the middle of a cell."""
    return (cell[1] + 0.5) / width, (cell[0] + 0.5) / height


def over_photo(axes: Axes, cells: NDArray[Any], photo: Image, **how: Any) -> None:
    """Cells (h, w) or (h, w, 3) drawn smoothly where the photo would be."""
    height, width = photo.shape[:2]
    axes.imshow(cells, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="bilinear", **how)


def mark(axes: Axes, point: Point, photo: Image) -> None:
    """A ring at a point of a photo."""
    x, y = point[0] * photo.shape[1] - 0.5, point[1] * photo.shape[0] - 0.5
    axes.plot(x, y, "o", markersize=5, markerfacecolor="none", markeredgecolor="black", markeredgewidth=2)
    axes.plot(x, y, "o", markersize=5, markerfacecolor="none", markeredgecolor="white", markeredgewidth=1.1)
