"""The regions of an image for retrieval, and their properties. Pure functions of tensors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clove_hub.data.masks import VOID
from clove_hub.geometry import bilinear

from .scores import confusion

SALIENT = 0.5
"""Above it a pixel belongs to the object."""
_ROUNDS = 30


class Regions(NamedTuple):
    """The regions of one image."""

    vectors: Tensor
    """Unit vectors (R, C)."""
    classes: Tensor
    """The class that most of a region's pixels have; 255 where none of them has one: (R,)."""
    counts: Tensor
    """How many pixels of each region (rows) have which class: int64 (R, K)."""
    given: Tensor
    """The class that a region takes without being retrieved; -1 where it is retrieved: (R,)."""


# ---- clusters --------------------------------------------------------------------------------------------------------


def describe(cells: Tensor, assigned: Tensor, places: Tensor, mask: Tensor, classes: int) -> Regions:
    """The clusters of an image's cells as regions.

    Args:
        cells: unit features (N, C).
        assigned: the region of each cell, (N,); each region from 0 to the last has one.
        places: the region of each pixel, (H, W).
        mask: the class of each pixel, (H, W).
    """
    regions = int(assigned.max()) + 1
    sums = torch.zeros(regions, cells.shape[1]).index_add_(0, assigned, cells)
    counts = _counts(places, mask, regions, classes)
    majority = torch.where(counts.sum(1) > 0, counts.argmax(1), VOID)
    return Regions(F.normalize(sums, dim=1), majority, counts, torch.full((regions,), -1))


def spherical_kmeans(cells: Tensor, count: int, random: np.random.Generator) -> Tensor:
    """Clusters unit vectors by their cosine: (N, C) -> the cluster of each, (N,).

    The clusters are numbered from 0, and each has a vector; there may be fewer than `count`. The first centers are drawn as in k-means++ (Arthur and Vassilvitskii, SODA 2007).
    """
    count = min(count, len(cells))
    centers = cells[int(random.integers(len(cells)))][None]
    while len(centers) < count:
        distance = (1 - (cells @ centers.T).amax(1)).clamp(min=0).double().cumsum(0)
        if float(distance[-1]) <= 0:  # fewer different vectors than clusters
            break
        place = torch.searchsorted(distance, float(random.random()) * distance[-1], right=True)
        centers = torch.cat([centers, cells[int(place.clamp(max=len(cells) - 1))][None]])
    assigned = (cells @ centers.T).argmax(1)
    for _ in range(_ROUNDS):
        sums = torch.zeros_like(centers).index_add_(0, assigned, cells)
        centers = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centers)
        before, assigned = assigned, (cells @ centers.T).argmax(1)
        if torch.equal(before, assigned):
            break
    kept = torch.bincount(assigned, minlength=count) > 0  # a center may have lost all of its vectors
    return (kept.cumsum(0) - 1)[assigned]


# ---- the object ------------------------------------------------------------------------------------------------------


def salient(features: Tensor, saliency: Tensor, mask: Tensor, classes: int, shares: tuple[float, float]) -> Regions:
    """The non-salient region, with class 0, and the salient one, as in MaskContrast (Van Gansbeke et al., ICCV 2021).

    The object's vector is the sum over its pixels of saliency times feature, the features resized to the image
    bilinearly. Its class is the most frequent one except 0, the largest in a tie.

    Args:
        features: (C, h, w).
        saliency: of each pixel, 0 to 1: (H, W).
        mask: the class of each pixel, (H, W).
        shares: the part of the height and of the width of the features that the image covers.
    """
    inside = saliency > SALIENT
    rows, columns = (
        bilinear(cells, side, share) for cells, side, share in zip(features.shape[1:], mask.shape, shares, strict=True)
    )
    weights = rows.T @ (saliency * inside) @ columns  # the share of each cell in the sum over the pixels
    vector = F.normalize((features * weights).sum((1, 2)), dim=0)
    counts = _counts(inside.long(), mask, 2, classes)
    backwards = counts[1, 1:].flip(0)
    majority = classes - 1 - backwards.argmax() if bool(backwards.any()) else torch.tensor(VOID)
    return Regions(
        torch.stack([torch.zeros_like(vector), vector]),
        torch.stack([torch.tensor(0), majority]),
        counts,
        torch.tensor([0, -1]),
    )


def _counts(places: Tensor, mask: Tensor, regions: int, classes: int) -> Tensor:
    """How many pixels of each region (rows) have which class."""
    side = max(regions, classes)
    return confusion(mask, torch.where(mask < classes, places, -1), side)[:regions, :classes]
