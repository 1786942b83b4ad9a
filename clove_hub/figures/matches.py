"""The cells of two views that show the same place (CLoVE Eq. 1 and Figure 2), as a run's method matches them.

A matched cell of view A has the color of its place, and a cell of view B that matches it has the same color. Numbers
mark the pairs that are nearest to each other; each appears once in either view.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from numpy.typing import NDArray
from torch import Tensor

from clove_hub.backbones import feature_shape
from clove_hub.data.images import read_image
from clove_hub.geometry import Grid, cell_centers, match_cells
from clove_hub.views import DeviceViews, Draw, ViewSpec, allocate, write_sample
from clove_hub.views import draw as draw_views

from ..weights import METHOD_SOURCE
from .output import WIDTH
from .photos import add_photo_arguments, found_photos, read_each, read_method
from .sheet import Row, sheet
from .style import BLUE, ORANGE, Image
from .words import SMALL

MOST_NUMBERED = 10
"""Cells a side of a view; with more, numbers would not fit in them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=f"a run of clove or pixpro: {METHOD_SOURCE}")
    add_photo_arguments(parser, photos=2)
    parser.add_argument(
        "--views",
        nargs=2,
        type=int,
        default=(0, 1),
        metavar="NUMBER",
        help="the two views to draw, counted from 0 (default: 0 1)",
    )


def draw(options: argparse.Namespace) -> Figure:
    """Two crops of each photo and the cells of both that show the same place.

    Raises:
        ValueError: the run's method matches no cells, has no such views, or there are no photos.
    """
    method = read_method(options.run, "matched cells", ("clove", "pixpro")).method
    spec: ViewSpec = method.view_spec
    first, second = options.views
    if not (0 <= first < len(spec.views) and 0 <= second < len(spec.views)) or first == second:
        raise ValueError(f"--views {first} {second}: expected two different numbers from 0 to {len(spec.views) - 1}")
    grids = [feature_shape(method.student["backbone"], spec.views[number].size)[1:] for number in (first, second)]
    photos = [image for _, image in read_each(found_photos(options.data, options.photos), read_image)]
    distance = method.settings.match_distance
    return matched_cells(photos, spec, (first, second), [(h, w) for h, w in grids], distance, options.width)


def matched_cells(
    images: Sequence[Image],
    spec: ViewSpec,
    pair: tuple[int, int],
    grids: Sequence[Grid],
    distance: float,
    width: float = WIDTH,
) -> Figure:
    """A row for each photo: the photo with its two crops, and the views as the method sees them.

    Args:
        images: each (H, W, 3).
        spec: the views; those numbered `pair` are drawn.
        grids: cells of the feature map of each of the two, in height and width.
        distance: T_pos, in units of the larger cell diagonal.
    """
    widest = max(image.shape[1] / image.shape[0] for image in images)
    titles = ("photo and crops", "view A", "view B")
    rows = [Row((widest, 1, 1), titles=() if number else titles) for number in range(len(images))]
    on = sheet(
        rows,
        width,
        "Cells of the same color show the same place; equal numbers mark the two cells that are nearest to each other. Dark "
        "cells have no match.",
    )
    for image, panels in zip(images, on.panels, strict=True):
        draw_row(panels, image, spec, pair, grids, distance)
    return on.figure


def draw_row(
    row: Sequence[Axes], image: Image, spec: ViewSpec, pair: tuple[int, int], grids: Sequence[Grid], distance: float
) -> None:
    whole, left, right = row
    sample = overlapping(image, spec, pair, grids, distance)
    batch = allocate(spec, 1)
    write_sample(batch, 0, image, sample)
    pixels = [view for group in DeviceViews(spec)(batch) for view in group.pixels[:, 0]]
    mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
    boxes = torch.from_numpy(sample.boxes[list(pair)])  # (2, 4)
    match = match_cells(boxes[0], grids[0], boxes[1], grids[1], distance)  # (N0, N1)

    whole.imshow(image)
    for box, color, name in zip(boxes.tolist(), (BLUE, ORANGE), "AB", strict=True):
        outline(whole, box, image.shape[:2], color, name)
    places = place_colors(*cell_centers(boxes[0], grids[0]))  # (N0, 3)
    own = np.where(match.any(1).numpy()[:, None], places, np.nan)
    numbers = cell_numbers(match, center_distances(boxes, grids))
    for axes, number, cells, colors, named in (
        (left, pair[0], grids[0], own, numbers[0]),
        (right, pair[1], grids[1], means(match, places), numbers[1]),
    ):
        size = pixels[number].shape[-1]
        axes.imshow((pixels[number] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
        draw_cells(axes, colors, named, cells, size)


# ---- pieces ----------------------------------------------------------------------------------------------------------


def overlapping(image: Image, spec: ViewSpec, pair: tuple[int, int], grids: Sequence[Grid], distance: float) -> Draw:
    """The first draw, of the first hundred, whose two views share a fair number of cells without being the same."""
    draws = [draw_views(spec, 0, 0, index, *image.shape[:2]) for index in range(100)]

    def shared(sample: Draw) -> float:
        a, b = torch.from_numpy(sample.boxes[list(pair)])
        return float(match_cells(a, grids[0], b, grids[1], distance).any(1).float().mean())

    return next((sample for sample in draws if 0.25 < shared(sample) < 0.7), draws[0])


def outline(axes: Axes, box: Sequence[float], shape: tuple[int, ...], color: str, name: str) -> None:
    """A crop's box on the photo, named; a flipped one is marked."""
    height, width = shape
    x0, y0, x1, y1 = box[0] * (width - 1), box[1] * (height - 1), box[2] * (width - 1), box[3] * (height - 1)
    axes.add_patch(Polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill=False, edgecolor=color, linewidth=2))
    axes.annotate(
        f"{name} (flipped)" if x0 > x1 else name,
        (min(x0, x1), y0 if name == "A" else y1),  # two corners, as both crops may begin at the same place
        xytext=(3, -3 if name == "A" else 3),
        textcoords="offset points",
        va="top" if name == "A" else "bottom",
        fontsize=SMALL,
        color="white",
        bbox={"facecolor": color, "edgecolor": "none", "pad": 1.5},
    )


def place_colors(columns: Tensor, rows: Tensor) -> NDArray[np.float64]:
    """(W,) and (H,) -> (H * W, 3): hue by the direction from the middle of the cells, saturation by the distance."""
    offset = torch.cartesian_prod(rows - rows.mean(), columns - columns.mean()).double().numpy()[:, ::-1]
    hue = (np.arctan2(offset[:, 1], offset[:, 0]) / (2 * np.pi)) % 1
    radius = np.hypot(*offset.T)
    saturation = 0.25 + 0.75 * radius / max(radius.max(), 1e-12)
    colors: NDArray[np.float64] = hsv_to_rgb(np.stack([hue, saturation, np.ones_like(hue)], 1))
    return colors


def means(match: Tensor, colors: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each key cell the mean color of the query cells that match it, NaN where none does: (N1, 3)."""
    weight = match.double().numpy()  # (N0, N1)
    total = weight.sum(0)[:, None]
    return np.where(total > 0, weight.T @ colors / np.maximum(total, 1), np.nan)


def center_distances(boxes: Tensor, grids: Sequence[Grid]) -> Tensor:
    """How far the centers of the cells of two views are from each other in the photo: (2, 4) -> (N0, N1)."""
    centers = [
        torch.stack([x.repeat(grid[0]), y.repeat_interleave(grid[1])], 1)  # (N, 2)
        for grid, (x, y) in ((grid, cell_centers(box, grid)) for box, grid in zip(boxes, grids, strict=True))
    ]
    return torch.cdist(centers[0], centers[1])


def cell_numbers(match: Tensor, distance: Tensor) -> tuple[list[int | None], list[int | None]]:
    """The numbers of the query and of the key cells, from 1: those of two matched cells nearest to each other are the same.

    Args:
        match: (N0, N1).
        distance: (N0, N1).
    """
    apart = distance.where(match, torch.inf)
    keys, queries = apart.argmin(1), apart.argmin(0)  # (N0,), (N1,)
    paired = match.any(1) & (queries[keys] == torch.arange(len(keys)))
    numbers: tuple[list[int | None], list[int | None]] = [None] * match.shape[0], [None] * match.shape[1]
    for number, query in enumerate(paired.nonzero()[:, 0].tolist(), start=1):
        numbers[0][query] = numbers[1][int(keys[query])] = number
    return numbers


def draw_cells(axes: Axes, colors: NDArray[np.float64], numbers: Sequence[int | None], grid: Grid, size: int) -> None:
    """Half-transparent cells over a view of `size` pixels, with their numbers where these fit.

    Cells whose color is NaN are darkened.
    """
    alpha = np.where(np.isnan(colors[:, :1]), 0.6, 0.5)
    cells = np.concatenate([np.nan_to_num(colors), alpha], 1).reshape(*grid, 4)
    axes.imshow(cells, extent=(-0.5, size - 0.5, size - 0.5, -0.5), interpolation="nearest")
    for position in range(1, grid[1]):
        axes.axvline(position * size / grid[1] - 0.5, color="white", linewidth=0.4)
    for position in range(1, grid[0]):
        axes.axhline(position * size / grid[0] - 0.5, color="white", linewidth=0.4)
    for cell, number in enumerate(numbers):
        if number is not None and max(grid) <= MOST_NUMBERED:
            row, column = divmod(cell, grid[1])
            x, y = (column + 0.5) * size / grid[1] - 0.5, (row + 0.5) * size / grid[0] - 0.5
            axes.text(
                *(x, y, str(number)),
                ha="center", va="center", fontsize=SMALL, color="white",
                path_effects=[patheffects.withStroke(linewidth=2, foreground="black")],
            )  # fmt: skip
