"""Clusters of the features of all images, each assigned to one class: as many as there are classes, and many more.

Ziegler and Asano, "Self-Supervised Learning of Object Parts for Semantic Segmentation" (Leopart, CVPR 2022), as CrIBo
and NeCo evaluate it too. Nothing is trained on the masks; they only determine the class of a cluster.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clove_hub.data.masks import VOID, Pair, Segmented, open_segmented

from ..weights.backbone import Backbone, side_by_side
from .kept import Kept, Maps, features_key, kept_maps, own_folder
from .processes import gather, share
from .progress import tracked
from .reading import normalized, resized
from .result import Outcome
from .scores import many_to_one, merged, one_to_one, zero_miou
from .segmenting import nearest, outcome, whole_side
from .unfinished import once

VERSION = 1
RULE = "leopart"
RANDOMNESS = "the first centers of k-means, and the cells that it learns from"
PREPROCESSING = ("mean", "std")
_SCORED = 100
"""Pixels a side at which clusters and masks are compared."""
_PER_CLUSTER = 256
"""Cells for each cluster that k-means learns from, at most: faiss's default."""


@dataclass(frozen=True)
class Settings:
    levels: tuple[int, ...] = (-1,)
    """Feature levels, concatenated: -1 is the last (layer4 of a ResNet), -2 the one before."""
    size: int = 448
    """Side of all images in pixels; reduced to a multiple of the patch size."""
    clusters: tuple[int, ...] = (0, 500)
    """Numbers of clusters; 0 for as many as there are classes, which are then matched one to one."""
    components: int = 50
    """Principal components used for clustering."""
    rounds: int = 100
    """Maximum iterations of k-means."""
    starts: int = 5
    """Starts of k-means, of which the best counts."""
    seeds: int = 5
    """Number of clusterings, with the given seed and the following ones; the mean is reported."""
    batch: int = 16
    """Images in one forward pass."""
    test: str = "val"
    """Name of the split that is clustered and scored."""
    test_images: int | None = None
    """At most this many, spread evenly over the list; null for all."""

    def __post_init__(self) -> None:
        counts = (self.size, self.components, self.rounds, self.starts, self.seeds, self.batch)
        if min(*counts, self.test_images or 1, len(self.levels), len(self.clusters)) < 1 or min(self.clusters) < 0:
            raise ValueError(f"{self}: all must be positive, with at least one level and one number of clusters")
        if len(set(self.clusters)) < len(self.clusters):
            raise ValueError(f"{self}: give each number of clusters once")


def evaluate(backbone: Backbone, data: Path, settings: Settings, seed: int) -> Outcome:
    """`mIoU K=...` for each number of clusters, in percent, means over the seeds; the figures of classes are the first's.

    Args:
        data: images with a mask each, in one of the layouts of `open_segmented`.

    Raises:
        ValueError: scikit-learn is not installed, something is wrong with the data, or there are more clusters than cells.
    """
    try:
        kmeans = import_module("sklearn.cluster").KMeans
        one_thread = import_module("threadpoolctl").threadpool_limits  # which scikit-learn needs
    except ImportError as error:
        raise ValueError("cluster needs scikit-learn: pip install 'clove-hub[evaluation]'") from error
    part = open_segmented(data, settings.test).spread(settings.test_images)
    classes, seeds = len(part.classes), list(range(seed, seed + settings.seeds))
    units = [(count or classes, number) for count in settings.clusters for number in seeds]
    files = [path for pair in part.pairs for path in pair]
    with (
        own_folder(features_key(backbone, data, files, f"cluster {settings} {seed} {part}")) as folder,
        _features(backbone, data, part, settings) as seen,
    ):
        part = part.of(seen.images)
        truth = [nearest(torch.from_numpy(part.mask(pair)), (_SCORED, _SCORED)) for pair in part.pairs]
        if not any(bool((mask < classes).any()) for mask in truth):
            raise ValueError(f"the masks of {data} ({settings.test}) are all void ({VOID}): choose images with classes")
        cells = components(seen.levels, settings.components, settings.batch, backbone.device)
        if (most := max(count for count, _ in units)) > (there := cells[..., 0].size):
            raise ValueError(f"clusters={most} is more than the {there} cells: lower clusters, or use more images")

        def tried(unit: tuple[int, int]) -> Tensor:
            count, number = unit
            assigned = clustered(kmeans, cells.reshape(-1, cells.shape[-1]), count, settings, number)
            return taken(assigned.reshape(cells.shape[:-1]), truth, classes, count)

        def kept(unit: tuple[int, int]) -> Tensor:
            return once(folder / f"{unit[0]}-{unit[1]}.clusters", partial(tried, unit))

        own = share(units)
        # Each in one thread, for the sums of several threads come in any order; so several at once.
        with one_thread(1), ThreadPoolExecutor(os.cpu_count()) as pool:
            found = gather(tracked(pool.map(kept, own), "clustering", len(own)))
    matrices = [taken_for(matrix) for matrix in found]
    scores = [
        {
            f"mIoU K={count}": zero_miou(matrix)
            for (count, own_seed), matrix in zip(units, matrices, strict=True)
            if own_seed == number
        }
        for number in seeds
    ]
    return outcome(data, [part], settings.test, seeds, scores, matrices[: len(seeds)], seen.left_out)


def taken_for(matrix: Tensor) -> Tensor:
    """The confusion matrix (K, K) after each cluster is assigned to a class: one to one if there are as many.

    Args:
        matrix: how many pixels of each class (rows) are in which cluster: int64 (K, C).
    """
    alike = matrix.shape[0] == matrix.shape[1]
    return merged(matrix, one_to_one(matrix) if alike else many_to_one(matrix))


# ---- cells -----------------------------------------------------------------------------------------------------------


def _features(backbone: Backbone, data: Path, part: Segmented, settings: Settings) -> AbstractContextManager[Kept]:
    """The maps of the images that can be read."""
    seen, side = backbone.preprocessing, whole_side(backbone, settings.size)

    def load(pair: Pair) -> Tensor:
        photo = seen.reading.levels(pair[0])
        part.mask(pair, (photo.shape[1], photo.shape[0]))  # a bad mask should raise before the long part
        small = resized(photo, lambda whole: whole.resize((side, side), Image.Resampling.BILINEAR))
        return normalized(small, seen.mean, seen.std)

    photos, shown = [photo for photo, _ in part.pairs], f"{side} bilinear"
    return kept_maps(backbone, data, part.pairs, load, settings.levels, settings.batch, photos=photos, shown=shown)


def components(levels: Sequence[Maps], count: int, batch: int, device: torch.device) -> NDArray[np.float32]:
    """The principal components of all cells, whose channels are standardized first: (N, h, w, P).

    Args:
        levels: the maps of N images at each level.
        count: of the components, P; fewer where there are not as many channels.
        batch: images at once.
    """

    def maps() -> Iterator[Tensor]:
        for start in tracked(range(0, len(levels[0]), batch), "principal components"):
            yield side_by_side([level[start : start + batch].to(device) for level in levels])

    total, square, cells = torch.zeros(()), torch.zeros(()), 0
    for some in maps():
        rows = some.transpose(0, 1).flatten(1).double()  # (C, B * h * w)
        total, square, cells = total.to(rows) + rows.sum(1), square.to(rows) + rows @ rows.T, cells + rows.shape[1]
    mean = total / cells
    covariance = square / cells - mean[:, None] * mean
    spread = covariance.diagonal().clamp(min=0).sqrt()
    scale = torch.where(spread > 1e-8 * spread.max(), 1 / spread, 0)
    vectors = torch.linalg.eigh(covariance * scale[:, None] * scale).eigenvectors.flip(1)[:, :count]
    onto = (scale[:, None] * vectors).float()
    found = [torch.einsum("bchw,cp->bhwp", some - mean.float()[:, None, None], onto).cpu() for some in maps()]
    return torch.cat(found).numpy()


def clustered(
    kmeans: Callable[..., Any], cells: NDArray[np.float32], count: int, settings: Settings, seed: int
) -> NDArray[np.int32]:
    """The cluster of each cell, by k-means from cells drawn at random, as faiss does it: (N, P) -> (N,)."""
    random = np.random.default_rng(seed)
    learned = random.permutation(len(cells))[: _PER_CLUSTER * count]
    model = kmeans(
        count,
        init="random",
        n_init=settings.starts,
        max_iter=settings.rounds,
        tol=0,
        random_state=int(random.integers(2**31)),
    )
    found: NDArray[np.int32] = model.fit(cells[learned]).predict(cells)
    return found


def taken(clusters: NDArray[np.int32], truth: Sequence[Tensor], classes: int, count: int) -> Tensor:
    """How many pixels of each class (rows) are in which cluster: int64 (K, C).

    Args:
        clusters: of the cells of N images, (N, h, w).
        truth: of each image the class of each pixel, (H, W); others than 0 to K - 1 do not count.
    """
    matrix = torch.zeros(classes, count, dtype=torch.int64)
    for image, mask in zip(torch.from_numpy(clusters), truth, strict=True):
        known = mask < classes
        places = mask[known].long() * count + nearest(image, (mask.shape[0], mask.shape[1]))[known]
        matrix += torch.bincount(places, minlength=classes * count).view(classes, count)
    return matrix
