"""Where each head of CLoVE's attention looks from chosen points of a photo (section 3.2): the context of a cell."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL.Image import Image as PillowImage
from torch import Tensor

from clove_hub.backbones import feature_map
from clove_hub.evaluation.reading import normalized

from ..weights import METHOD_SOURCE, MethodState, load_method
from ..weights.backbone import finite
from .photos import Point, add_photo_arguments, cell_of, mark, middle_of, over_photo, read_point, read_squares
from .style import SMALL, WIDTH, Image, add_scale, bare, tight

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
    add_photo_arguments(parser, photos=1, size=448)


def draw(options: argparse.Namespace) -> Figure:
    """
    Raises:
        ValueError: it is no run of CLoVE or has no checkpoint, or there are no photos.
    """
    images = [image for _, image in read_squares(options)]
    learned = load_method(options.run)
    if learned.name != "clove":
        raise ValueError(f"{options.run} is of the method {learned.name}, which has no attention: give one of clove")
    return attention_maps(
        [np.asarray(image) for image in images], [attention(learned, image) for image in images], options.points
    )


def attention(learned: MethodState, image: PillowImage) -> Tensor:
    """What each cell attends to, for each head: (heads, h, w, h, w); from (h, w) to (h, w)."""
    student, how = learned.method.student, learned.preprocessing
    with torch.no_grad():
        cells = student["projector"](feature_map(student["backbone"], normalized(image, how.mean, how.std)[None]))
        height, width = cells.shape[2:]
        weights: Tensor = student["predictor"].weights(cells.flatten(2).transpose(1, 2))[0]  # (heads, N, N)
    return finite(weights, learned.what).view(-1, height, width, height, width)


def attention_maps(images: Sequence[Image], maps: Sequence[Tensor], points: Sequence[Point]) -> Figure:
    """A row for each point of each photo: the photo with the point, and a panel for each head.

    Brightness is the weight as a multiple of what even attention would give each cell.

    Args:
        images: each (H, W, 3).
        maps: for each image (heads, h, w, h, w).
    """
    rows = [(image, weights, point) for image, weights in zip(images, maps, strict=True) for point in points]
    heads = maps[0].shape[0]
    wide = WIDTH / (heads + 1)
    heights = [wide * image.shape[0] / image.shape[1] for image, _, _ in rows]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.65), layout=tight())
    panels = figure.subplots(len(rows), heads + 1, squeeze=False, height_ratios=heights)
    shares = []
    for _, weights, point in rows:
        row, column = cell_of(point, *weights.shape[1:3])
        shares.append(weights[:, row, column] * weights[0, 0, 0].numel())  # (heads, h, w), 1 where attention is even
    brightest = max(float(share.quantile(0.99)) for share in shares)
    for (image, _, point), share, own in zip(rows, shares, panels, strict=True):
        own[0].imshow(image)
        for axes, head in zip(own[1:], share, strict=True):
            over_photo(axes, head.numpy(), image, cmap="viridis", vmin=0, vmax=brightest)
        mark(own[0], point, image)
        for axes in own[1:]:
            mark(axes, middle_of(cell_of(point, *share.shape[1:]), *share.shape[1:]), image)
        for axes in own:
            bare(axes)
    for axes, title in zip(panels[0], ["photo", *(f"head {number}" for number in range(1, heads + 1))], strict=True):
        axes.set_title(title, fontsize=SMALL, pad=3)
    add_scale(figure, panels[0, 1].images[0], "attention, as a multiple of an even share", "max")
    return figure
