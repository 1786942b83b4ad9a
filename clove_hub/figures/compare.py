"""Several backbones on the same photos: principal components of their feature maps, and what resembles a chosen point."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from clove_hub.weights import load_backbone

from .pca import colors_of, components
from .photos import (
    Point,
    add_model_arguments,
    add_photo_arguments,
    cell_of,
    mark,
    middle_of,
    over_photo,
    read_point,
    read_squares,
    seen,
)
from .style import SMALL, WIDTH, Image, add_scale, bare, tight, wrapped

LABELS = 0.3
"""Inches beside the rows."""


class Row(NamedTuple):
    """What one backbone makes of the photos."""

    name: str
    components: list[Tensor]
    """For each photo (h, w, 3), as of `components`."""
    similarity: list[Tensor]
    """For each photo the cosine of each cell to that of the point, (h, w)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, nargs="+")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="what the rows are called (default: the sources)")
    parser.add_argument(
        "--point", type=read_point, default=(0.5, 0.5), metavar="X,Y", help="fractions of a photo (default: 0.5,0.5)"
    )
    add_photo_arguments(parser, photos=3, size=448)


def draw(options: argparse.Namespace) -> Figure:
    """
    Raises:
        ValueError: a model cannot be loaded, the names are not as many, or there are no photos.
    """
    names = options.names or [Path(source).name or source for source in options.model]
    if len(names) != len(options.model):
        raise ValueError(f"--names has {len(names)}, but --model has {len(options.model)}: give a name for each")
    images = [image for _, image in read_squares(options)]
    rows = []
    for name, source in zip(names, options.model, strict=True):
        backbone = load_backbone(source, seed=options.seed)
        maps = [seen(backbone, image, options.level) for image in images]
        rows.append(Row(name, components(maps), [similarity(one, options.point) for one in maps]))
    return comparison([np.asarray(image) for image in images], rows, options.point)


def similarity(features: Tensor, point: Point) -> Tensor:
    """The cosine of each cell to the one that shows the point, (C, h, w) -> (h, w).

    The mean over the cells is taken off first: after a ReLU all features are alike in what they share.
    """
    centerd = features - features.mean((1, 2), keepdim=True)
    unit = F.normalize(centerd, dim=0)
    row, column = cell_of(point, *features.shape[1:])
    return (unit * unit[:, row, column, None, None]).sum(0)


def comparison(images: Sequence[Image], rows: Sequence[Row], point: Point) -> Figure:
    """The photos with the point marked, and below them for each backbone its components beside the similarities."""
    ratios = [image.shape[1] / image.shape[0] for image in images for _ in range(2)]
    height = (WIDTH - LABELS) / sum(ratios)
    figure = Figure(figsize=(WIDTH, height * (len(rows) + 1) + 0.5), layout=tight())
    panels = figure.subplots(len(rows) + 1, len(ratios), squeeze=False, width_ratios=ratios)
    for axes in panels.flat:
        bare(axes)
    for own, image in zip(panels[0].reshape(-1, 2), images, strict=True):
        for axes, title in zip(own, ("components", "like the point"), strict=True):
            axes.imshow(image)
            axes.set_title(title, fontsize=SMALL, pad=3)
        mark(own[1], point, image)
    panels[0, 0].set_ylabel("photo", fontsize=SMALL)
    for row, line in zip(rows, panels[1:], strict=True):
        line[0].set_ylabel(wrapped(row.name, height), fontsize=SMALL)
        for own, image, scores, alike in zip(line.reshape(-1, 2), images, row.components, row.similarity, strict=True):
            over_photo(own[0], colors_of(scores).numpy(), image)
            over_photo(own[1], alike.numpy(), image, cmap="viridis", vmin=0, vmax=1)
            mark(own[1], middle_of(cell_of(point, *alike.shape), *alike.shape), image)
    add_scale(figure, panels[1, 1].images[0], "cosine to the cell of the point", "min")
    return figure
