"""How many cells of two crops find each other: CLoVE's objective as a measure, without labels.

Two views of each photo are drawn, as in training. A cell of one view whose place is also in the other view is correct
if its nearest neighbor there, by the cosine of the features, is a matching cell (CLoVE Eq. 1).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clove_hub.data.files import described, spread
from clove_hub.data.finder import some_images
from clove_hub.geometry import Grid, match_cells
from clove_hub.methods.base import byol_views
from clove_hub.views import DeviceViews, View, ViewSpec, allocate, draw, for_bands, write_sample

from ..weights.backbone import Backbone
from .reading import each_readable
from .result import Outcome

log = logging.getLogger(__name__)

VERSION = 1
RULE = "own"
RANDOMNESS = "the views"
PREPROCESSING = ("mean", "std")


@dataclass(frozen=True)
class Settings:
    images: int = 500
    """At most this many photos, spread evenly over the folder."""
    size: int = 224
    """Side of both views in pixels."""
    min_scale: float = 0.2
    """The smallest area of a crop, as a fraction of the photo; the largest is the whole."""
    color: bool = True
    """Whether the views' colors are changed as in BYOL; otherwise only crops and flips."""
    distance: float = 0.7
    """Cells match if their centers are closer than this, in units of the larger cell's diagonal."""
    batch: int = 16
    """Images in one forward pass."""

    def __post_init__(self) -> None:
        if min(self.images, self.size, self.batch) < 1 or self.distance <= 0 or not 0 < self.min_scale <= 1:
            raise ValueError(f"{self}: images, size, batch and distance must be positive, min_scale in (0, 1]")


def evaluate(backbone: Backbone, data: Path, settings: Settings, seed: int) -> Outcome:
    """`correspond`: percentage of the cells with a match that find it. `chance`: the figure for random neighbors.

    Args:
        data: a folder of photos, at any depth.
    """
    seen = backbone.preprocessing
    found = some_images(data, seen.reading.suffixes)
    log.info("%s: %s", data, found.tally)
    photos = spread(found.paths, settings.images)
    views = byol_views(settings.size, (settings.min_scale, 1.0), "bicubic")
    if not settings.color:
        plain = View(size=settings.size, scale=(settings.min_scale, 1.0), gray=0.0)
        views = (plain, replace(plain))
    spec, _ = for_bands(ViewSpec(views), seen.mean, seen.std, seen.depth)
    prepare = DeviceViews(spec).to(backbone.device)

    def load(item: tuple[int, Path]) -> tuple[int, NDArray[Any]]:
        return item[0], seen.reading.read(item[1])

    def work(images: list[tuple[int, NDArray[Any]]]) -> NDArray[np.float64]:
        """For each photo the number of cells that are right, of those with a match, and of those right by chance."""
        crops = allocate(spec, len(images))
        for position, (index, image) in enumerate(images):
            write_sample(crops, position, image, draw(spec, seed, 0, index, *image.shape[:2]))
        (pair,) = prepare(crops.to(backbone.device))
        first, second = (backbone.maps(pixels)[0] for pixels in pair.pixels)
        rows = count_found(first, second, pair.boxes[0], pair.boxes[1], settings.distance)
        rows += count_found(second, first, pair.boxes[1], pair.boxes[0], settings.distance)
        return rows.cpu().numpy()

    counts, kept, left_out = each_readable(list(enumerate(photos)), load, work, settings.batch, data)
    photos = [photos[number] for number in kept]
    right, matched, chance = (float(column.sum()) for column in np.concatenate(counts).T)
    if not matched:
        raise ValueError(f"no cell in the {len(photos)} pairs of views of {data} has a match: use more photos")
    return Outcome(
        {"correspond": 100 * right / matched, "chance": 100 * chance / matched},
        described(data, photos, len(photos)),
        (seed,),
        left_out=left_out,
    )


def count_found(queries: Tensor, keys: Tensor, query_boxes: Tensor, key_boxes: Tensor, distance: float) -> Tensor:
    """How many cells of a view find the matching cell of another one.

    Args:
        queries: feature maps (B, C, h, w).
        keys: feature maps (B, C, h', w').
        query_boxes: (B, 4), see `clove_hub.geometry`.
        key_boxes: (B, 4).
        distance: T_pos, in units of the larger cell diagonal.

    Returns:
        float64 (B, 3): cells whose nearest neighbor matches them; cells that have a match; the expectation of the
        first for neighbors drawn at random.
    """
    query_grid: Grid = (queries.shape[2], queries.shape[3])
    key_grid: Grid = (keys.shape[2], keys.shape[3])
    match = match_cells(query_boxes.double(), query_grid, key_boxes.double(), key_grid, distance)  # (B, Nq, Nk)
    unit_queries, unit_keys = (F.normalize(maps.flatten(2).float(), dim=1) for maps in (queries, keys))
    nearest = torch.einsum("bcq,bck->bqk", unit_queries, unit_keys).argmax(2, keepdim=True)  # (B, Nq, 1)
    right = match.gather(2, nearest).sum((1, 2))
    return torch.stack([right.double(), match.any(2).sum(1).double(), match.double().mean(2).sum(1)], 1)
