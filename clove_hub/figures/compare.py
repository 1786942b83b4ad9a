"""Several backbones on the same photos: principal components of their feature maps, and similarity to a chosen point."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from clove_hub.weights import Backbone

from .output import WIDTH
from .pca import colors_of, components
from .photos import (
    SIZE,
    Photo,
    Point,
    add_level_argument,
    add_model_arguments,
    add_photo_arguments,
    cell_of,
    cells_note,
    cells_of,
    mark,
    middle_of,
    over_photo,
    read_backbones,
    read_photos,
    read_point,
    seen,
)
from .sheet import SCALE, Row, add_scale, sheet
from .style import Image

MIDDLE = (0.5, 0.5)


class Found(NamedTuple):
    """What one backbone makes of the photos."""

    heading: str
    components: Sequence[Tensor]
    """For each photo (h, w, 3), as of `components`."""
    similarity: Sequence[Tensor]
    """For each photo the cosine of each cell to that of the point, (h, w)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_level_argument(parser)
    parser.add_argument(
        "--point", type=read_point, default=MIDDLE, metavar="X,Y", help="fractions of a photo (default: 0.5,0.5)"
    )
    add_photo_arguments(parser, photos=3, size=SIZE)


def draw(options: argparse.Namespace) -> Figure:
    """Several backbones on the same photos: components, and what resembles a point.

    Raises:
        ValueError: a model cannot be loaded, the names are not as many, or there are no photos.
    """
    photos = read_photos(options)
    return draw_backbones(read_backbones(options), photos, options.size, options.level, options.point, options.width)


def draw_backbones(
    backbones: Mapping[str, Backbone],
    photos: Sequence[Photo],
    size: int = SIZE,
    level: int = -1,
    point: Point = MIDDLE,
    width: float = WIDTH,
) -> Figure:
    """The photos, and below them for each backbone its components beside what resembles the point.

    Args:
        backbones: by what they are called.
        size: pixels a side of what they see.
        level: of the feature maps, as in `Backbone.maps`.
        point: the same of all photos.
        width: inches.

    Raises:
        ValueError: a backbone has no such level, or takes no image of this size.
    """
    found = []
    for name, backbone in backbones.items():
        maps = [seen(backbone, photo, level, size) for photo in photos]
        heading = f"{name} ({cells_of(maps[0])})"
        found.append(Found(heading, components(maps), [similarity(one, point) for one in maps]))
    return comparison([photo.shown(size) for photo in photos], found, point, size, width)


def similarity(features: Tensor, point: Point) -> Tensor:
    """The cosine of each cell to the one that shows the point, (C, h, w) -> (h, w).

    The mean over the cells is taken off first: after a ReLU all features are alike in what they share.
    """
    centered = features - features.mean((1, 2), keepdim=True)
    unit = F.normalize(centered, dim=0)
    row, column = cell_of(point, *features.shape[1:])
    return (unit * unit[:, row, column, None, None]).sum(0)


def comparison(
    images: Sequence[Image], backbones: Sequence[Found], point: Point, size: int, width: float = WIDTH
) -> Figure:
    """Photos in columns, backbones in rows.

    Args:
        images: each (H, W, 3).
        size: pixels a side of what the backbones saw.
    """
    ratios = [image.shape[1] / image.shape[0] for image in images for _ in range(2)]
    titles = ["components", "like the point"] * len(images)
    rows = [Row(ratios, titles=titles), *(Row(ratios, one.heading) for one in backbones)]
    on = sheet(rows, width, cells_note(size), SCALE)
    for number, image in enumerate(images):
        left, right = on.panels[0][2 * number : 2 * number + 2]
        left.imshow(image)
        right.imshow(image)
        mark(right, point, image)
        for panels, one in zip(on.panels[1:], backbones, strict=True):
            left, right = panels[2 * number : 2 * number + 2]
            alike = one.similarity[number]
            over_photo(left, colors_of(one.components[number]).numpy(), image)
            over_photo(right, alike.numpy(), image, cmap="viridis", vmin=0, vmax=1)
            mark(right, middle_of(cell_of(point, *alike.shape), *alike.shape), image)
    add_scale(on, on.panels[1][1].images[0], "cosine to the cell of the point", "min")
    return on.figure
