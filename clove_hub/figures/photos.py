"""Photos for the figures, and their feature maps."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image as PillowImage
from torch import Tensor

from clove_hub.command import user_path
from clove_hub.data.files import spread
from clove_hub.data.finder import some_images
from clove_hub.data.images import printable, read_image
from clove_hub.evaluation.reading import central_square, each_readable, normalized
from clove_hub.weights import SOURCE, Backbone, MethodState, load_backbone, load_method
from clove_hub.weights.source import find_source

from .style import Image

log = logging.getLogger(__name__)

T = TypeVar("T")

SIZE = 896
"""Pixels a side of what a backbone sees: 28 cells of a ResNet, 56 or 64 of most vision transformers."""
Point = tuple[float, float]
"""Across and down, as fractions of a photo."""


class Photo(NamedTuple):
    """The part of a photo that is drawn and seen: its largest central square."""

    name: str
    square: PillowImage.Image

    def at(self, size: int) -> PillowImage.Image:
        """At `size` pixels a side."""
        return central_square(self.square, size, size, "bicubic")

    def pixels(self, backbone: Backbone, size: int) -> Tensor:
        """The backbone's input, (1, 3, S, S), at the size nearest to `size` that has whole cells."""
        side = max(1, round(size / backbone.multiple)) * backbone.multiple
        how = backbone.preprocessing
        return normalized(self.at(side), how.mean, how.std)[None]

    def shown(self, size: int) -> Image:
        """The picture to show, not enlarged: (H, W, 3)."""
        return np.asarray(self.at(min(size, self.square.width)))


def add_photo_arguments(parser: argparse.ArgumentParser, photos: int, size: int | None = None) -> None:
    """--data, --photos and, where there is a default for it, --size."""
    parser.add_argument(
        "--data", required=True, nargs="+", type=user_path, metavar="PATH", help="photos, or folders of them"
    )
    parser.add_argument(
        "--photos", type=int, default=photos, help=f"how many of those in --data, spread evenly (default: {photos})"
    )
    if size:
        said = (
            f"side in pixels of a photo's central square as the network sees it (default: {size}); more pixels give "
            "more cells"
        )
        parser.add_argument("--size", type=int, default=size, help=said)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model and --names, both for several, and --seed."""
    several = "may be given several times; all see the same photos"
    parser.add_argument(
        "--model", required=True, nargs="+", action="extend", metavar="SOURCE", help=f"{SOURCE}; {several}"
    )
    parser.add_argument(
        "--names", nargs="+", action="extend", metavar="NAME", help="labels of the models (default: the sources)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed, also of random: weights (default: 0)")


def add_level_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--level", type=int, default=-1, help="feature level, from the end (default: -1, the last)")


def add_protocol_arguments(parser: argparse.ArgumentParser, data: str, example: str) -> None:
    """--model, --names, --data, --seed and settings, as the kinds that show a protocol have them."""
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, type=user_path, metavar="DIR", help=data)
    parser.add_argument("settings", nargs="*", metavar="key=value", help=f"settings of the protocol, such as {example}")


def read_backbones(options: argparse.Namespace) -> dict[str, Backbone]:
    """The models by what they are called, all different: --names, or the last parts of the sources.

    Raises:
        ValueError: one cannot be loaded, or the names are not as many as the models, or not different.
    """
    names = options.names or [Path(source).name or source for source in options.model]
    if len(set(names)) < len(names) and not options.names:
        names = options.model
    if len(names) != len(options.model):
        raise ValueError(f"--names has {len(names)}, but --model has {len(options.model)}: give a name for each")
    if len(set(names)) < len(names):
        raise ValueError(f"the models are called {', '.join(names)}: give different --names")
    return {name: load_backbone(source, seed=options.seed) for name, source in zip(names, options.model, strict=True)}


def read_method(source: str, wanted: str, methods: Sequence[str]) -> MethodState:
    """The method of a run, for the kinds that need more than its backbone.

    Args:
        wanted: what the kind shows of it, for the message.
        methods: that have this.

    Raises:
        ValueError: the source holds no whole method, or that of another method.
    """
    whose = f"give the folder of a run of {' or '.join(methods)}"
    if find_source(source).kind not in ("run", "checkpoint"):
        raise ValueError(f"{source} is only a backbone, which has no {wanted}: {whose}")
    learned = load_method(source)
    if learned.name not in methods:
        raise ValueError(f"{source} is of the method {learned.name}, which has no {wanted}: {whose}")
    return learned


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
    """Each photo with the result of `read`; unreadable ones are left out with a warning, up to a limit.

    Raises:
        ValueError: too many cannot be read.
    """
    images, kept, _ = each_readable(photos, read, lambda loaded: loaded[0], 1)
    return [(photos[number], image) for number, image in zip(kept, images, strict=True)]


def read_photos(options: argparse.Namespace) -> list[Photo]:
    """The photos that the options name.

    Raises:
        ValueError: as `load_photos`, or --size is below one.
    """
    if options.size < 1:
        raise ValueError(f"--size is {options.size}; expected at least 1 pixel")
    return load_photos(options.data, options.photos)


def load_photos(paths: Sequence[Path], limit: int) -> list[Photo]:
    """The photos themselves and those in the folders; at most `limit`, spread evenly.

    Raises:
        ValueError: as `found_photos`, or too many cannot be read.
    """
    read = read_each(found_photos(paths, limit), lambda path: whole_square(read_image(path)))
    return [Photo(printable(path.stem), image) for path, image in read]


def whole_square(photo: Image) -> PillowImage.Image:
    """The largest central square of a photo."""
    side = min(photo.shape[:2])
    return central_square(PillowImage.fromarray(photo), side, side, "bicubic")


def seen(backbone: Backbone, photo: Photo, level: int, size: int) -> Tensor:
    """The feature map of one level of a photo: (C, h, w)."""
    with torch.no_grad():
        return backbone.maps(photo.pixels(backbone, size), (level,))[0][0].float().cpu()


def cells_of(one: Tensor) -> str:
    """The size of a feature map (C, h, w), in words."""
    return f"{one.shape[2]}\u00d7{one.shape[1]} cells"


def cells_note(size: int) -> str:
    """The note below cells that are drawn without smoothing."""
    return f"Each square is a cell of the feature map of a photo of {size}\u00d7{size} pixels, not smoothed."


def read_point(text: str) -> Point:
    """`0.3,0.7` -> (0.3, 0.7).

    Raises:
        argparse.ArgumentTypeError: it is no point of a photo.
    """
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a point; expected two fractions, as in 0.3,0.7") from None
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is outside the photo; both fractions go from 0 to 1")
    return x, y


def cell_of(point: Point, height: int, width: int) -> tuple[int, int]:
    """Row and column of the cell that shows a point."""
    return min(int(point[1] * height), height - 1), min(int(point[0] * width), width - 1)


def middle_of(cell: tuple[int, int], height: int, width: int) -> Point:
    """The point in the middle of a cell."""
    return (cell[1] + 0.5) / width, (cell[0] + 0.5) / height


def over_photo(axes: Axes, cells: NDArray[Any], photo: Image, **how: Any) -> None:
    """Cells (h, w) or (h, w, 3) where the photo would be, each as the square that it is."""
    height, width = photo.shape[:2]
    axes.imshow(cells, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest", **how)


def mark(axes: Axes, point: Point, photo: Image) -> None:
    """A ring at a point of a photo."""
    x, y = point[0] * photo.shape[1] - 0.5, point[1] * photo.shape[0] - 0.5
    axes.plot(x, y, "o", markersize=5, markerfacecolor="none", markeredgecolor="black", markeredgewidth=2)
    axes.plot(x, y, "o", markersize=5, markerfacecolor="none", markeredgecolor="white", markeredgewidth=1.1)
