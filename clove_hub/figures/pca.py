"""Photos above the first three principal components of their feature maps, drawn as colors, for one or several models.

The first component is the lightness, the second goes from blue to yellow, the third from green to purple, so that
color-blind readers can distinguish the first two.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from clove_hub.weights import Backbone

from .output import WIDTH
from .photos import (
    SIZE,
    Photo,
    add_level_argument,
    add_model_arguments,
    add_photo_arguments,
    cells_note,
    cells_of,
    over_photo,
    read_backbones,
    read_photos,
    seen,
)
from .sheet import Row, sheet
from .style import Image

OKLAB_TO_LMS = torch.tensor(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]],
    dtype=torch.float64,
)
LMS_TO_RGB = torch.tensor(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ],
    dtype=torch.float64,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_level_argument(parser)
    parser.add_argument(
        "--foreground",
        action="store_true",
        help="components of the foreground only: of the cells where the first component of all cells is positive",
    )
    add_photo_arguments(parser, photos=5, size=SIZE)


def draw(options: argparse.Namespace) -> Figure:
    """Photos above the principal components of their feature maps.

    Raises:
        ValueError: a model cannot be loaded, or there are no photos.
    """
    photos = read_photos(options)
    return draw_backbones(
        read_backbones(options), photos, options.size, options.level, options.foreground, options.width
    )


def draw_backbones(
    backbones: Mapping[str, Backbone],
    photos: Sequence[Photo],
    size: int = SIZE,
    level: int = -1,
    foreground: bool = False,
    width: float = WIDTH,
) -> Figure:
    """The photos above what each backbone makes of them.

    Args:
        backbones: by what they are called.
        size: pixels a side of what they see.
        level: of the feature maps, as in `Backbone.maps`.
        foreground: whether the components are those of the foreground, as of `foreground_components`.
        width: inches.

    Raises:
        ValueError: a backbone has no such level, or takes no image of this size.
    """
    find = foreground_components if foreground else components
    rows = {}
    for name, backbone in backbones.items():
        maps = [seen(backbone, photo, level, size) for photo in photos]
        rows[f"{name} ({cells_of(maps[0])})"] = find(maps)
    images = [photo.shown(size) for photo in photos]
    return component_maps(images, rows, [photo.name for photo in photos], size, foreground, width)


def components(maps: Sequence[Tensor]) -> list[Tensor]:
    """The first three principal components of all maps together, so that a color means the same in every photo.

    Of features at unit length, as a few cells with large ones would be the first component otherwise.

    Args:
        maps: each (C, h, w).

    Returns:
        For each map (h, w, 3), between 0 and 1; the sign of a component is such that its largest weight is positive.
    """
    return _per_map(_stretched(_scores(_unit(maps), 3)), maps)


def foreground_components(maps: Sequence[Tensor]) -> list[Tensor]:
    """The same for the foreground alone, as in Oquab et al., "DINOv2" (2023), section 7.5.

    The foreground is the cells in which the first component of all cells is positive. The paper leaves its sign to the eye;
    here it is that with which the edges of the photos are background.

    Returns:
        For each map (h, w, 3), NaN where there is background.
    """
    cells = _unit(maps)
    first = _scores(cells, 1)[:, 0]
    edge = torch.cat([_at_edge(*one.shape[1:]).flatten() for one in maps])
    inside = (first if float(first[edge].mean()) <= 0 else -first) > 0
    found = torch.full((len(cells), 3), torch.nan, dtype=torch.float64)
    if bool(inside.any()):  # not where all cells are the same
        found[inside] = _stretched(_scores(cells[inside], 3))
    return _per_map(found, maps)


def _unit(maps: Sequence[Tensor]) -> Tensor:
    """The cells of all maps, (N, C)."""
    return F.normalize(torch.cat([one.flatten(1).T.double() for one in maps]), dim=1)


def _scores(cells: Tensor, count: int) -> Tensor:
    """The first principal components, (N, C) -> (N, count), with zeros for those that there are none of."""
    centered = cells - cells.mean(0)
    _, vectors = torch.linalg.eigh(centered.T @ centered)  # the largest last
    axes = vectors.T.flip(0)[:count]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    return F.pad(centered @ axes.T, (0, count - len(axes)))


def _stretched(scores: Tensor) -> Tensor:
    """To between 0 and 1; two percent at each end are cut off."""
    low, high = scores.quantile(0.02, 0), scores.quantile(0.98, 0)
    return ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


def _at_edge(height: int, width: int) -> Tensor:
    """Which cells lie at the edge of a map: (h, w)."""
    edge = torch.ones(height, width, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    return edge


def _per_map(scores: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(scores, [one[0].numel() for one in maps])
    return [part.view(*one.shape[1:], -1) for part, one in zip(parts, maps, strict=True)]


def colors_of(scores: Tensor) -> Tensor:
    """Three numbers between 0 and 1 as lightness, blue to yellow, and green to purple: (..., 3) -> sRGB (..., 3).

    By way of Oklab (Ottosson 2020), in which equal steps look equal.
    """
    lightness, yellow, purple = scores.double().unbind(-1)
    lab = torch.stack([0.35 + 0.55 * lightness, 0.24 * purple - 0.12, 0.28 * yellow - 0.14], -1)
    linear = (lab @ OKLAB_TO_LMS.T).pow(3) @ LMS_TO_RGB.T
    linear = linear.clamp(0, 1)
    return torch.where(linear > 0.0031308, 1.055 * linear.clamp(min=1e-9).pow(1 / 2.4) - 0.055, 12.92 * linear)


def component_maps(
    images: Sequence[Image],
    rows: Mapping[str, Sequence[Tensor]],
    titles: Sequence[str],
    size: int,
    foreground: bool = False,
    width: float = WIDTH,
) -> Figure:
    """The photos, and below them a row of their components for each backbone.

    Args:
        images: each (H, W, 3).
        rows: for each backbone's heading (h, w, 3) for each image, as of `components`; what is NaN is black.
        titles: for each image.
        size: pixels a side of what the backbones saw.
    """
    ratios = [image.shape[1] / image.shape[0] for image in images]
    whose = "the foreground (the rest is black)" if foreground else "all photos together"
    note = (
        f"{cells_note(size)} The first three principal components of the features of {whose}: lightness, blue to yellow, "
        "and green to purple."
    )
    on = sheet([Row(ratios, titles=titles), *(Row(ratios, heading) for heading in rows)], width, note)
    for axes, image in zip(on.panels[0], images, strict=True):
        axes.imshow(image)
    for panels, scores in zip(on.panels[1:], rows.values(), strict=True):
        for axes, image, score in zip(panels, images, scores, strict=True):
            over_photo(axes, colors_of(score).nan_to_num(0).numpy(), image)
    return on.figure
