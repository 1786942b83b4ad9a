"""Where each head of CLoVE's attention looks from chosen points of a photo (section 3.2): the context of a cell."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from clove_hub.backbones import feature_map

from ..weights import METHOD_SOURCE, Backbone, MethodState
from ..weights.backbone import finite
from .output import WIDTH
from .photos import (
    SIZE,
    Photo,
    Point,
    add_photo_arguments,
    cell_of,
    cells_note,
    mark,
    middle_of,
    over_photo,
    read_method,
    read_photos,
    read_point,
)
from .sheet import SCALE, Row, add_scale, sheet
from .style import Image

POINTS = [(0.25, 0.5), (0.5, 0.5), (0.75, 0.5)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=f"a CLoVE run: {METHOD_SOURCE}")
    parser.add_argument(
        "--points",
        nargs="+",
        type=read_point,
        default=POINTS,
        metavar="X,Y",
        help="fractions of each photo (default: three across its middle)",
    )
    add_photo_arguments(parser, photos=1, size=SIZE)


def draw(options: argparse.Namespace) -> Figure:
    """
    Raises:
        ValueError: it is no run of CLoVE or has no checkpoint, or there are no photos.
    """
    learned = read_method(options.run, "attention", ("clove",))
    photos = read_photos(options)
    maps = [attention(learned, photo, options.size) for photo in photos]
    images = [photo.shown(options.size) for photo in photos]
    return attention_maps(images, maps, options.points, options.size, options.width)


def attention(learned: MethodState, photo: Photo, size: int) -> Tensor:
    """What each cell attends to, for each head: (heads, h, w, h, w); from (h, w) to (h, w).

    Args:
        size: pixels a side of what the student sees; the nearest that has whole cells is taken.
    """
    student = learned.method.student
    backbone = Backbone(student["backbone"], learned.preprocessing, learned.what)
    with torch.no_grad():
        cells = student["projector"](feature_map(backbone.model, photo.pixels(backbone, size)))
        height, width = cells.shape[2:]
        weights: Tensor = student["predictor"].weights(cells.flatten(2).transpose(1, 2))[0]  # (heads, N, N)
    return finite(weights, learned.what).view(-1, height, width, height, width)


def attention_maps(
    images: Sequence[Image], maps: Sequence[Tensor], points: Sequence[Point], size: int, width: float = WIDTH
) -> Figure:
    """A row for each point of each photo: the photo with the point, and a panel for each head.

    Brightness is the weight as a multiple of what even attention would give each cell.

    Args:
        images: each (H, W, 3).
        maps: for each image (heads, h, w, h, w).
        size: pixels a side of what the network saw.
    """
    rows = [(image, weights, point) for image, weights in zip(images, maps, strict=True) for point in points]
    heads = maps[0].shape[0]
    titles = ["photo", *(f"head {number}" for number in range(1, heads + 1))]
    on = sheet(
        [
            Row([image.shape[1] / image.shape[0]] * (heads + 1), titles=() if number else titles)
            for number, (image, _, _) in enumerate(rows)
        ],
        width,
        cells_note(size),
        SCALE,
    )
    shares = []
    for _, weights, point in rows:
        row, column = cell_of(point, *weights.shape[1:3])
        shares.append(weights[:, row, column] * weights[0, 0, 0].numel())  # (heads, h, w), 1 where attention is even
    brightest = max(float(share.quantile(0.99)) for share in shares)
    for (image, _, point), share, own in zip(rows, shares, on.panels, strict=True):
        own[0].imshow(image)
        mark(own[0], point, image)
        for axes, head in zip(own[1:], share, strict=True):
            over_photo(axes, head.numpy(), image, cmap="viridis", vmin=0, vmax=brightest)
            mark(axes, middle_of(cell_of(point, *head.shape), *head.shape), image)
    add_scale(on, on.panels[0][1].images[0], "attention, as a multiple of an even share", "max")
    return on.figure
