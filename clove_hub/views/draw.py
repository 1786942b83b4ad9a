"""Every random number of a sample's views: a pure function of (seed, epoch, index, height, width, spec).

Nothing else enters, so the views of a sample do not depend on the number of workers or processes, on the
batch it falls into, or on a restart. The numbers come from a counter-based generator (Philox), in which any
stream can be opened directly instead of being reached by drawing all that comes before it.
"""

import itertools
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .auto_augment import CHANCES, POLICY
from .spec import Boxes, Interpolation, Jitter, ViewSpec

# The 24 orders of color jitter; 0 brightness, 1 contrast, 2 saturation, 3 hue.
ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int8)

_TRIES = 10  # at a crop that fits, as in torchvision's RandomResizedCrop; then the central fallback
_UNIFORMS = 2 * _TRIES + 13  # uniform numbers used by one view


class Purpose(IntEnum):
    """What a stream of random numbers is for. Two purposes never share a stream."""

    VIEWS = 0
    ORDER = 1
    SUBSTITUTE = 2
    OVERLAP = 3
    AUTO_AUGMENT = 4


def stream(seed: int, epoch: int, index: int, purpose: int) -> np.random.Generator:
    """Opens the random stream of (seed, epoch, index, purpose), each a whole number in [0, 2**64).

    Seed and epoch are the key; index and purpose are the two high words of the 256-bit counter, of which a
    stream only ever advances the low ones, so that different arguments never share a number.

    Raises:
        ValueError: an argument is negative or does not fit in 64 bits.
    """
    for name, value in (("seed", seed), ("epoch", epoch), ("index", index), ("purpose", purpose)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} is {value}; a random stream needs a whole number in [0, 2**64)")
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, 0, index, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@dataclass(frozen=True)
class Draw:
    """All parameters of the V views of one sample, in the order of `ViewSpec.views`."""

    crops: NDArray[np.int64]  # (V, 4): top, left, height, width, in pixels of the image
    boxes: NDArray[np.float32]  # (V, 4): x0, y0, x1, y1 as fractions of the image; x0 > x1 where flipped
    flipped: NDArray[np.bool_]  # (V,)
    jittered: NDArray[np.bool_]  # (V,): whether color jitter applies at all
    orders: NDArray[np.int8]  # (V, 4): the four jitter operations in turn, see ORDERS
    factors: NDArray[np.float32]  # (V, 4): brightness, contrast, saturation factors; hue as a fraction of the circle
    gray: NDArray[np.bool_]  # (V,)
    sigmas: NDArray[np.float32]  # (V,): standard deviation of the blur in pixels; 0 where there is none
    solarized: NDArray[np.bool_]  # (V,)
    policies: NDArray[np.int8]  # (V,): which of AutoAugment's sub-policies; -1 where there is none
    applied: NDArray[np.bool_]  # (V, 2): whether each of its two operations is carried out
    negative: NDArray[np.bool_]  # (V, 2): whether with its magnitude's sign turned
    interpolations: tuple[Interpolation, ...]  # (V,): of the crops; the spec's, nothing is drawn


def draw(spec: ViewSpec, seed: int, epoch: int, index: int, height: int, width: int) -> Draw:
    """Draws the views of sample `index` in `epoch` from an image of `height` x `width` pixels.

    A crop's area is uniform in `scale` and its aspect ratio log-uniform in `ratio`; the first of ten tries
    that fits inside the image counts, and if none does, the largest central crop whose ratio is allowed. Where a
    view asks for overlap, the first of ten such tries that fits and overlaps enough takes the crop's place.

    Raises:
        ValueError: the image has no pixels, or a part of (seed, epoch, index) is out of range (see `stream`).
    """
    if height < 1 or width < 1:
        raise ValueError(f"image {index} has {height} x {width} pixels; views need at least one per side")
    table = _table(spec)
    uniforms = stream(seed, epoch, index, Purpose.VIEWS).random((len(spec.views), _UNIFORMS))
    search, place, others, color = np.split(uniforms, [2 * _TRIES, 2 * _TRIES + 2, 2 * _TRIES + 9], axis=1)
    flip, jitter, order, gray, blur, sigma, solarize = others.T
    crops = _crops(table, search, place, height, width)
    if len(table.constrained):
        constrained = stream(seed, epoch, index, Purpose.OVERLAP).random((len(table.constrained), 4, _TRIES))
        crops[table.constrained] = _overlapping(table, constrained, crops, height, width)
    policies, applied, negative = _policies(table, seed, epoch, index)
    flipped, *rest = np.stack([flip, jitter, gray, blur, solarize]) < table.chances
    jittered, grayed, blurred, solarized = (chosen & (policies < 0) for chosen in rest)
    return Draw(
        crops=crops,
        boxes=crop_boxes(crops, flipped, height, width, spec.boxes).astype(np.float32),
        flipped=flipped,
        jittered=jittered,
        orders=ORDERS[(order * len(ORDERS)).astype(np.int64)],
        factors=_between(table.factor, color).astype(np.float32),
        gray=grayed,
        sigmas=np.where(blurred, _between(table.sigma, sigma), 0.0).astype(np.float32),
        solarized=solarized,
        policies=policies,
        applied=applied,
        negative=negative,
        interpolations=tuple(view.interpolation for view in spec.views),
    )


class _Table(NamedTuple):
    """The spec with one array for each field instead of one object for each view; ranges have their low ends first."""

    area: NDArray[np.float64]  # (2, V, 1)
    ratio: NDArray[np.float64]  # (2, V, 1)
    chances: NDArray[np.float64]  # (5, V): of flip, jitter, gray, blur and solarize
    sigma: NDArray[np.float64]  # (2, V)
    factor: NDArray[np.float64]  # (2, V, 4)
    augment: NDArray[np.float64]  # (V,)
    constrained: NDArray[np.int64]  # (C,): the views that ask for overlap, ...
    others: NDArray[np.int64]  # (C,): ... with which view, ...
    share: NDArray[np.float64]  # (C, 1): ... and how much of their own area


@lru_cache(maxsize=16)
def _table(spec: ViewSpec) -> _Table:
    views = spec.views
    jitters = [view.jitter or Jitter(0, 0, 0, 0, 0) for view in views]
    strengths = np.array([(j.brightness, j.contrast, j.saturation, j.hue) for j in jitters])  # (V, 4)
    neutral = np.array([1.0, 1.0, 1.0, 0.0])
    chances = [(v.flip, j.probability, v.gray, v.blur, v.solarize) for v, j in zip(views, jitters, strict=True)]
    constrained = [(number, view.overlap) for number, view in enumerate(views) if view.overlap]
    return _Table(
        area=np.array([view.scale for view in views]).T[:, :, None],
        ratio=np.array([view.ratio for view in views]).T[:, :, None],
        chances=np.array(chances).T,
        sigma=np.array([view.blur_sigma for view in views]).T,
        factor=np.stack([np.maximum(neutral - strengths, [0, 0, 0, -1]), neutral + strengths]),
        augment=np.array([view.auto_augment for view in views]),
        constrained=np.array([number for number, _ in constrained], dtype=np.int64),
        others=np.array([overlap.view for _, overlap in constrained], dtype=np.int64),
        share=np.array([overlap.share for _, overlap in constrained])[:, None],
    )


def _between(bounds: NDArray[np.float64], uniforms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Uniforms in [0, 1) brought into ranges, low ends and high ends (2, ...)."""
    low, high = bounds
    values: NDArray[np.float64] = low + (high - low) * uniforms
    return values


def _crops(
    table: _Table, search: NDArray[np.float64], place: NDArray[np.float64], height: int, width: int
) -> NDArray[np.int64]:
    """(V, 4) top, left, height, width from the uniforms (V, 20) of the tries and (V, 2) of the position."""
    heights, widths, fits = _sizes(table.area, table.ratio, search[:, :_TRIES], search[:, _TRIES:], height, width)
    first = fits.argmax(axis=1)  # 0 where nothing fits; those rows are replaced below
    rows = np.arange(len(fits))
    sides = np.stack([heights[rows, first], widths[rows, first]], axis=1)  # (V, 2)
    room = np.array([height, width]) - sides
    corners = np.floor(place * (room + 1))
    crops = np.concatenate([corners, sides], axis=1).astype(np.int64)
    for row in np.flatnonzero(~fits.any(axis=1)):
        crops[row] = _central_crop(table.ratio[:, row, 0], height, width)
    return crops


def _sizes(
    areas: NDArray[np.float64],
    ratios: NDArray[np.float64],
    area: NDArray[np.float64],
    ratio: NDArray[np.float64],
    height: int,
    width: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Heights and widths of tries (V, T) from ranges (2, V, 1) and uniforms, and whether each fits inside the image."""
    areas, ratios = _between(areas, area) * (height * width), np.exp(_between(np.log(ratios), ratio))
    widths = np.rint(np.sqrt(areas * ratios))
    heights = np.rint(np.sqrt(areas / ratios))
    return heights, widths, (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)


def _overlapping(
    table: _Table, uniforms: NDArray[np.float64], crops: NDArray[np.int64], height: int, width: int
) -> NDArray[np.int64]:
    """(C, 4) crops of the constrained views from the uniforms (C, 4, T) of their tries and all free crops (V, 4)."""
    area, ratio, down, across = uniforms.transpose(1, 0, 2)  # (C, T) each
    areas, ratios = table.area[:, table.constrained], table.ratio[:, table.constrained]
    heights, widths, fits = _sizes(areas, ratios, area, ratio, height, width)
    tops, lefts = np.floor(down * (height - heights + 1)), np.floor(across * (width - widths + 1))
    top, left, h, w = crops[table.others].T[:, :, None]  # (C, 1) each
    shared_down = np.minimum(tops + heights, top + h) - np.maximum(tops, top)
    shared_across = np.minimum(lefts + widths, left + w) - np.maximum(lefts, left)
    shared = shared_down.clip(0) * shared_across.clip(0)
    good = fits & (shared >= table.share * heights * widths)
    first = good.argmax(axis=1)
    tries = np.stack([tops, lefts, heights, widths], axis=-1)[np.arange(len(good)), first].astype(np.int64)
    return np.where(good.any(axis=1, keepdims=True), tries, crops[table.constrained])


def _policies(
    table: _Table, seed: int, epoch: int, index: int
) -> tuple[NDArray[np.int8], NDArray[np.bool_], NDArray[np.bool_]]:
    """Sub-policies (V,), which operations apply (V, 2) and with which sign (V, 2)."""
    count = len(table.augment)
    if not table.augment.any():
        return np.full(count, -1, dtype=np.int8), np.zeros((count, 2), dtype=bool), np.zeros((count, 2), dtype=bool)
    uniforms = stream(seed, epoch, index, Purpose.AUTO_AUGMENT).random((count, 6))
    policies = np.where(uniforms[:, 0] < table.augment, (uniforms[:, 1] * len(POLICY)).astype(np.int8), -1)
    return policies.astype(np.int8), uniforms[:, 2:4] < CHANCES[policies], uniforms[:, 4:6] < 0.5


def _central_crop(ratios: NDArray[np.float64], height: int, width: int) -> tuple[int, int, int, int]:
    """The largest central crop with width / height inside the range; never less than one pixel a side."""
    (low, high), h, w = ratios, height, width
    if width / height < low:
        h = max(1, round(width / low))
    elif width / height > high:
        w = max(1, round(height * high))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_boxes(
    crops: NDArray[np.integer], flipped: NDArray[np.bool_], height: int, width: int, convention: Boxes
) -> NDArray[np.float64]:
    """Where crops (V, 4) begin and end, as fractions of the image by the convention of `ViewSpec.boxes`: (V, 4).

    x is swapped where a crop is flipped. By centers a side of one pixel has no extent to divide by: its only coordinate
    is 0.
    """
    top, left, h, w = crops.T.astype(np.float64)
    last = 1 if convention == "centers" else 0
    across, down = max(width - last, 1), max(height - last, 1)
    x0, x1 = left / across, (left + w - last) / across
    return np.stack([np.where(flipped, x1, x0), top / down, np.where(flipped, x0, x1), (top + h - last) / down], axis=1)
