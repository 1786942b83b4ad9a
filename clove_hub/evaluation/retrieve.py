"""Semantic segment retrieval: regions of a validation image take the class of the nearest region of the training images.

Van Gansbeke et al., "Revisiting Contrastive Methods for Unsupervised Learning of Visual Representations" (NeurIPS
2021): the regions of an image are clusters of the features of its cells, found by k-means; a region is described by
the mean of its features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clove_hub.data.files import described
from clove_hub.data.masks import Pair, Segmented, open_segmented
from clove_hub.views import Purpose, stream

from ..weights.backbone import Backbone, with_stride_one
from .reading import LeftOut, each_readable, normalized
from .result import Outcome
from .scores import absent_classes, class_scores, confusion, segmentation_scores

VERSION = 1
RULE = "own"
RANDOMNESS = "the start of k-means"
PREPROCESSING = ("mean", "std")
_ROUNDS = 30

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    regions: int = 15
    """Clusters in each image."""
    fine: bool = True
    """Whether a ResNet's layer4 keeps the resolution of layer3, so that a cell is 16 pixels wide and not 32."""
    train: str = "train"
    """Name of the split that is learned from."""
    test: str = "val"
    """Name of the split that is scored."""
    train_images: int | None = None
    """At most this many, spread evenly over the list; null for all."""
    test_images: int | None = None
    """As `train_images`, of the split that is scored."""

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.train_images, self.test_images) if limit is not None]
        if min([self.regions, *limits]) < 1:
            raise ValueError(f"{self}: regions and the limits must be positive")


class Regions(NamedTuple):
    """The regions of one image."""

    vectors: Tensor
    """Unit vectors (R, C)."""
    classes: Tensor
    """The class that most of a region's pixels have; 255 where none of them has one: (R,)."""
    counts: Tensor
    """How many pixels of each region (rows) have which class: int64 (R, K)."""


class Divided(NamedTuple):
    """An image and its regions."""

    photo: Path
    truth: Tensor
    """The class of each pixel, 255 where there is none: uint8 (H, W)."""
    places: Tensor
    """The region of each pixel: (H, W)."""
    regions: Regions


class Bank(NamedTuple):
    """The regions of all training images, those of no class left out."""

    vectors: Tensor
    """(N, C)."""
    classes: Tensor
    """(N,)."""
    part: Segmented
    """The images that could be read."""
    left_out: LeftOut
    """The others, and why."""

    def nearest(self, vectors: Tensor) -> Tensor:
        """The class of the region that is nearest to each vector: (R, C) -> (R,)."""
        return self.classes[(vectors @ self.vectors.T).argmax(1)]


def evaluate(backbone: Backbone, data: Path, settings: Settings, seed: int) -> Outcome:
    """`mIoU` and `pixel accuracy` of the images of the test split.

    Args:
        data: images with a mask each, in one of the layouts of `open_segmented`.
        seed: of the first centers of k-means.
    """
    train, test = open_splits(data, settings)
    backbone = prepared(backbone, settings)
    bank = remember(backbone, data, train, settings, seed)
    unread, train = bank.left_out, bank.part
    asked, test, unread_tests = divided(backbone, data, test, settings, seed, lambda image: image.regions)
    matrix = torch.zeros(len(train.classes), len(train.classes), dtype=torch.int64)
    for image in asked:
        matrix.index_add_(1, bank.nearest(image.vectors), image.counts.T)
    if not int(matrix.sum()):
        raise ValueError(f"the masks of {data} ({settings.test}) are all void")
    files = [path for pair in train.pairs + test.pairs for path in pair]
    return Outcome(
        segmentation_scores(matrix),
        described(data, files, len(test.pairs)),
        (seed,),
        split=settings.test,
        items={"class": class_scores(matrix, train.classes)},
        absent=absent_classes(matrix, test.classes),
        left_out=unread + unread_tests,
    )


def open_splits(data: Path, settings: Settings) -> tuple[Segmented, Segmented]:
    """The training and the test images."""
    return (
        open_segmented(data, settings.train).spread(settings.train_images),
        open_segmented(data, settings.test).spread(settings.test_images),
    )


def prepared(backbone: Backbone, settings: Settings) -> Backbone:
    """The backbone with the map that the settings ask for."""
    return replace(backbone, model=with_stride_one(backbone.model, "layer4")) if settings.fine else backbone


def remember(backbone: Backbone, data: Path, train: Segmented, settings: Settings, seed: int) -> Bank:
    """What is retrieved from: the regions of the training images. All processes must call it.

    Raises:
        ValueError: no pixel of a training image has a class.
    """
    found, part, left_out = divided(backbone, data, train, settings, seed, lambda image: image.regions)
    vectors, classes = torch.cat([r.vectors for r in found]), torch.cat([r.classes for r in found])
    known = classes < len(part.classes)
    if not bool(known.any()):
        raise ValueError(f"the masks of {data} ({settings.train}) are all void: there is nothing to retrieve")
    return Bank(vectors[known], classes[known], part, left_out)


def divided(
    backbone: Backbone, data: Path, part: Segmented, settings: Settings, seed: int, take: Callable[[Divided], T]
) -> tuple[list[T], Segmented, LeftOut]:
    """The images that can be read with their regions, these images, and the others. All processes must call it.

    Args:
        take: what is kept of each image.
    """
    seen = backbone.preprocessing

    def load(item: tuple[int, Pair]) -> tuple[int, Path, Tensor, Tensor]:
        number, pair = item
        photo = seen.reading.levels(pair[0])
        mask = part.mask(pair, (photo.shape[1], photo.shape[0]))
        return number, pair[0], normalized(photo, seen.mean, seen.std), torch.from_numpy(mask)

    def work(loaded: list[tuple[int, Path, Tensor, Tensor]]) -> T:
        ((number, path, pixels, mask),) = loaded
        wide = backbone.padded(pixels[None])
        features = F.normalize(backbone.maps(wide)[0][0].float(), dim=0).cpu()  # (C, h, w)
        cells = features.flatten(1).T  # (h * w, C)
        assigned = spherical_kmeans(cells, settings.regions, stream(seed, 0, number, Purpose.VIEWS))
        rows, columns = (
            torch.arange(side) * cells_across // padded_side
            for side, cells_across, padded_side in zip(mask.shape, features.shape[1:], wide.shape[2:], strict=True)
        )
        places = assigned.view(features.shape[1:])[rows][:, columns]
        return take(Divided(path, mask, places, describe(cells, assigned, places, mask, len(part.classes))))

    found, kept, left_out = each_readable(list(enumerate(part.pairs)), load, work, 1, data)
    return found, part.of(kept), left_out


def describe(cells: Tensor, assigned: Tensor, places: Tensor, mask: Tensor, classes: int) -> Regions:
    """The regions of an image.

    Args:
        cells: unit features (N, C).
        assigned: the region of each cell, (N,); each region from 0 to the last has one.
        places: the region of each pixel, (H, W).
        mask: the class of each pixel, (H, W).
    """
    regions = int(assigned.max()) + 1
    sums = torch.zeros(regions, cells.shape[1]).index_add_(0, assigned, cells)
    side = max(regions, classes)
    counts = confusion(mask, torch.where(mask < classes, places, -1), side)[:regions, :classes]
    majority = torch.where(counts.sum(1) > 0, counts.argmax(1), 255)
    return Regions(F.normalize(sums, dim=1), majority, counts)


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
