"""Keypoints of an object find the same parts of another object of its category by the features alone: PCK on SPair-71k.

There are two rules: feature maps resized to the photos' own sizes, as in DIFT (Tang et al., NeurIPS 2023); or cells of
a square, as in "A Tale of Two Features" (Zhang et al., NeurIPS 2023), whose program is sd-dino.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clove_hub.data.files import described, spread
from clove_hub.data.pairs import PhotoPair, Points, View, read_pairs
from clove_hub.geometry import bilinear, upsampled

from ..weights.backbone import Backbone
from .kept import features_key, own_folder
from .processes import gather, share
from .progress import tracked
from .reading import each_readable, normalized, resized
from .result import Items, Outcome
from .unfinished import once

VERSION = 1
RULE = "dift"
RANDOMNESS = ""
PREPROCESSING = ("mean", "std")

THRESHOLDS = (0.1, 0.05, 0.01)
"""Distances that count as right, in units of the longer side of the target's box."""
SIZES = {"dift": 768, "sd-dino": 840}
REMEMBERED = 32
"""Photos whose maps are kept: a category of SPair-71k's test split has fewer."""

Find = Callable[[PhotoPair], NDArray[np.float64]]


@dataclass(frozen=True)
class Settings:
    rule: Literal["dift", "sd-dino"] = "dift"
    """dift: feature maps are resized to the photos' sizes; sd-dino: cells of a square are compared."""
    levels: tuple[int, ...] = (-1,)
    """Feature levels, concatenated: -1 is the last, -2 the one before."""
    size: int | None = None
    """Side in pixels of the square that a photo is resized to; null for the rule's own: 768 (dift), 840 (sd-dino)."""
    split: str = "test"
    """Name of the split: test, val or trn."""
    pairs: int | None = None
    """At most this many, spread evenly over the list; null for all."""

    def __post_init__(self) -> None:
        if not self.levels or min(self.size or 1, 1 if self.pairs is None else self.pairs) < 1 or self.size == 0:
            raise ValueError(f"{self}: size and pairs must be positive, with at least one level")


def evaluate(backbone: Backbone, data: Path, settings: Settings, seed: int) -> Outcome:
    """`PCK@T image`, `PCK@T point` and `PCK@T category` (percent): the share of correct points.

    `image`: the mean over the pairs of each pair's share; `point`: the share of all points; `category`: the mean over the
    categories of the share of each category's points.

    Args:
        data: SPair-71k: `PairAnnotation/SPLIT`, `JPEGImages/CATEGORY`, `Layout/large/SPLIT.txt`.
        seed: nothing here is random.
    """
    pairs = spread(read_pairs(data, settings.split), settings.pairs)
    sizes = {view.photo: (view.size, pair) for pair in pairs for view in (pair.source, pair.target)}

    def check(photo: Path) -> None:
        height, width = backbone.preprocessing.reading.levels(photo).shape[:2]
        expected, pair = sizes[photo]
        if (width, height) != expected:
            raise ValueError(
                f"{photo} is {width}x{height} pixels, but {pair.annotation} has points in {expected[0]}x{expected[1]}"
            )

    photos = list(sizes)
    _, kept, left_out = each_readable(photos, check, len, 64, data)
    whole = {photos[number] for number in kept}
    pairs = [pair for pair in pairs if pair.source.photo in whole and pair.target.photo in whole]
    if not pairs:
        raise ValueError(f"no pair of {data} ({settings.split}) has two photos that can be read")
    files = sorted({photo for pair in pairs for photo in (pair.source.photo, pair.target.photo)})
    categories = sorted({pair.category for pair in pairs})

    def errors(category: str) -> list[list[float]]:
        find = matcher(backbone, settings)
        return [relative_errors(find(pair), pair).tolist() for pair in pairs if pair.category == category]

    read = [pair.annotation for pair in pairs] + files
    with own_folder(features_key(backbone, data, read, f"match {settings}")) as folder:
        own = tracked(share(categories), "matching, by category")
        rows = gather(once(folder / f"{category}.errors", partial(errors, category)) for category in own)
    found = {name: [np.array(one) for one in row] for name, row in zip(categories, rows, strict=True)}
    metrics, items = pck(found, inclusive=settings.rule == "dift")
    return Outcome(
        metrics,
        described(data, read, len(pairs)),
        (seed,),
        split=settings.split,
        items=items,
        left_out=left_out,
    )


def relative_errors(found: Points, pair: PhotoPair) -> NDArray[np.float64]:
    """Distances from the target's points to those found, in units of the longer side of its box: (K,)."""
    x0, y0, x1, y1 = pair.target.box
    distances: NDArray[np.float64] = np.linalg.norm(found - pair.target.points, axis=1)
    return distances / max(x1 - x0, y1 - y0)


def pck(errors: dict[str, list[NDArray[np.float64]]], inclusive: bool) -> tuple[dict[str, float], Items]:
    """The metrics, and the figures of each category.

    Args:
        errors: for each category those of the points of each pair.
        inclusive: whether an error equal to the threshold is correct.
    """
    compare = np.less_equal if inclusive else np.less
    metrics: dict[str, float] = {}
    items: dict[str, dict[str, float]] = {name: {} for name in errors}
    for threshold in THRESHOLDS:
        right = {name: [compare(one, threshold) for one in own] for name, own in errors.items()}
        points = {name: float(np.concatenate(own).mean()) for name, own in right.items()}
        shares = {name: [float(one.mean()) for one in own] for name, own in right.items()}
        every = [one for own in right.values() for one in own]
        figure = f"PCK@{threshold:g}"
        metrics[f"{figure} image"] = 100 * float(np.mean([share for own in shares.values() for share in own]))
        metrics[f"{figure} point"] = 100 * float(np.concatenate(every).mean())
        metrics[f"{figure} category"] = 100 * float(np.mean(list(points.values())))
        for name, figures in items.items():
            figures[f"{figure} image"] = 100 * float(np.mean(shares[name]))
            figures[f"{figure} point"] = 100 * points[name]
    for name, own in errors.items():
        items[name] |= {"pairs": len(own), "points": sum(map(len, own))}
    return metrics, {"category": items}


def matcher(backbone: Backbone, settings: Settings) -> Find:
    """What finds the points of a pair's source in its target, in pixels of the target: x and y, (K, 2)."""
    side = settings.size or SIZES[settings.rule]

    def seen(photo: Path, fit: Callable[[Image.Image], Image.Image]) -> tuple[Tensor, float]:
        """The map (C, h, w) of a photo brought to the square, and the padded square's side in pixels."""
        how = backbone.preprocessing
        pixels = backbone.padded(normalized(resized(how.reading.levels(photo), fit), how.mean, how.std)[None])
        return backbone.joined(pixels, settings.levels)[0].float(), float(pixels.shape[-1])

    @lru_cache(REMEMBERED)
    def cells(photo: Path) -> tuple[Tensor, float]:
        return seen(photo, lambda image: in_square(image, side))

    @lru_cache(REMEMBERED)
    def stretched(photo: Path, size: tuple[int, int]) -> tuple[Tensor, Tensor, float]:
        features, padded = seen(photo, lambda image: image.resize((side, side), Image.Resampling.BICUBIC))
        return features, pixel_norms(features, size, side / padded), side / padded

    def by_pixels(pair: PhotoPair) -> Points:
        source, _, covered = stretched(pair.source.photo, pair.source.size)
        target, norms, _ = stretched(pair.target.photo, pair.target.size)
        return nearest_pixels(
            pixel_vectors(source, pair.source.points, pair.source.size, covered), target, norms, covered
        )

    def by_cells(pair: PhotoPair) -> Points:
        (source, padded), (target, _) = cells(pair.source.photo), cells(pair.target.photo)
        scale, offset = placed(pair.source, side)
        found = nearest_cells(source, target, pair.source.points * scale + offset, padded)
        scale, offset = placed(pair.target, side)
        return (found - offset) / scale

    return by_pixels if settings.rule == "dift" else by_cells


# ---- maps at the photos' own sizes -----------------------------------------------------------------------------------


def pixel_norms(features: Tensor, size: tuple[int, int], covered: float = 1.0) -> Tensor:
    """Lengths of the vectors of a map (C, h, w) resized bilinearly: (H, W).

    A vector between cells is a sum of four neighbors, so its length follows from the products of neighbors; the vectors
    themselves, gigabytes of them, are never computed.

    Args:
        size: width and height.
        covered: the part of the map's height and width that the photo covers; what is beyond is padding.
    """
    cells = features.double()
    (r, rr), (c, cc) = (squares(bilinear(n, m, covered)) for n, m in zip(cells.shape[1:], size[::-1], strict=True))
    r, rr, c, cc = (one.to(cells.device) for one in (r, rr, c, cc))
    upper, lower, left, right = cells[:, :-1], cells[:, 1:], cells[:, :, :-1], cells[:, :, 1:]
    total = r @ cells.square().sum(0) @ c.T
    total += r @ (left * right).sum(0) @ cc.T + rr @ (upper * lower).sum(0) @ c.T
    across = (upper[:, :, :-1] * lower[:, :, 1:] + upper[:, :, 1:] * lower[:, :, :-1]).sum(0)
    total += rr @ across @ cc.T / 2
    return total.clamp(min=0).sqrt().to(features.dtype)


def squares(weights: Tensor) -> tuple[Tensor, Tensor]:
    """What the square of a sum of two neighbors takes of each neighbor's square, and of each product of neighbors.

    Args:
        weights: of the cells in each pixel, (pixels, cells), of which two neighbors are not 0.
    """
    weights = weights.double()
    return weights.square(), 2 * weights[:, :-1] * weights[:, 1:]


def pixel_vectors(features: Tensor, points: Points, size: tuple[int, int], covered: float = 1.0) -> Tensor:
    """Unit vectors of the pixels at points of a map resized bilinearly: (C, h, w) -> (K, C).

    Args:
        points: x and y in pixels, (K, 2).
        size: width and height.
        covered: as in `pixel_norms`.
    """
    x, y = (torch.from_numpy(points[:, axis].astype(int).clip(0, size[axis] - 1)) for axis in (0, 1))
    rows = bilinear(features.shape[1], size[1], covered)[y].to(features.device)  # (K, h)
    columns = bilinear(features.shape[2], size[0], covered)[x].to(features.device)  # (K, w)
    return F.normalize(torch.einsum("kh,chw,kw->kc", rows, features, columns), dim=1)


def nearest_pixels(vectors: Tensor, target: Tensor, norms: Tensor, covered: float = 1.0) -> Points:
    """The pixel with the greatest cosine to each vector: x and y, (K, 2).

    The products of the cells are resized to the photo's size, which equals the products of the resized vectors.

    Args:
        vectors: (K, C).
        target: a map (C, h, w).
        norms: of its vectors at the size of the photo, (H, W), as `pixel_norms` gives them.
        covered: as in `pixel_norms`.
    """
    height, width = norms.shape
    products = torch.einsum("kc,chw->khw", vectors, target)
    cosines = upsampled(products, (height, width), (covered, covered)) / norms.clamp(min=1e-12)
    best = cosines.flatten(1).argmax(1).cpu().numpy()
    return np.stack([best % width, best // width], 1).astype(np.float64)


# ---- cells of a square -----------------------------------------------------------------------------------------------


def in_square(image: Image.Image, side: int) -> Image.Image:
    """The image with its longer side `side` pixels long, in the middle of a black square."""
    longer = max(image.size)
    width, height = (side if length == longer else max(1, round(side * length / longer)) for length in image.size)
    square = Image.new(image.mode, (side, side))
    square.paste(image.resize((width, height), Image.Resampling.LANCZOS), ((side - width) // 2, (side - height) // 2))
    return square


def placed(view: View, side: int) -> tuple[float, Points]:
    """How points of a photo come into the square of `in_square`: times the first, plus the second."""
    longer = max(view.size)
    offset = [0 if length == longer else (side - max(1, round(side * length / longer))) // 2 for length in view.size]
    return side / longer, np.array(offset, dtype=np.float64)


def nearest_cells(source: Tensor, target: Tensor, points: Points, side: float) -> Points:
    """The middle of the cell with the greatest cosine to the cell of each point: x and y, (K, 2).

    Args:
        source: a map (C, h, h).
        target: the same.
        points: x and y in pixels of the square, (K, 2).
        side: of the square, in pixels.
    """
    cells = target.shape[2]
    length = side / cells
    x, y = torch.from_numpy((points / length).astype(int).clip(0, cells - 1)).unbind(1)
    vectors = F.normalize(source[:, y, x].T, dim=1)  # (K, C)
    best = (vectors @ F.normalize(target.flatten(1), dim=0)).argmax(1).cpu().numpy()
    return np.stack([best % cells, best // cells], 1) * length + length / 2 - 0.5
