"""Functions shared by the protocols that predict a class for each pixel: readable images, and maps at mask size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clove_hub.data.files import described
from clove_hub.data.masks import VOID, Pair, Segmented
from clove_hub.geometry import bilinear

from ..weights.backbone import Backbone
from ..weights.weights import Preprocessing
from .reading import LeftOut, each_readable
from .result import Outcome, mean_items
from .scores import absent_classes, class_scores, mean_and_deviation

_MOST = 2**26
"""Values of logits at once."""
_CHECKED = 64


def readable_part(seen: Preprocessing, data: Path, part: Segmented, split: str) -> tuple[Segmented, LeftOut]:
    """The images that can be read, and the others. All processes must call it.

    Faults of an image or its mask are reported before the long computation.

    Raises:
        ValueError: a mask is wrong, too many images cannot be read, or no pixel has a class.
    """

    def load(pair: Pair) -> bool:
        photo = seen.reading.levels(pair[0])
        return bool((part.mask(pair, (photo.shape[1], photo.shape[0])) != VOID).any())

    found, kept, left_out = each_readable(part.pairs, load, any, _CHECKED, data)
    if not any(found):
        raise ValueError(f"the masks of {data} ({split}) are all void ({VOID}): choose images with classes")
    return part.of(kept), left_out


def whole_side(backbone: Backbone, size: int) -> int:
    """The greatest side of an image of at most `size` pixels of which the backbone has whole cells: 504 of 512 with 14.

    Raises:
        ValueError: there is none.
    """
    if size < backbone.multiple:
        raise ValueError(f"size={size}: {backbone.name} needs a multiple of {backbone.multiple} pixels")
    return size - size % backbone.multiple


def nearest(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a mask (H, W) as `F.interpolate(mode="nearest")`: the pixel at floor(place * scale)."""
    rows, columns = (torch.arange(new) * old // new for old, new in zip(mask.shape, size, strict=True))
    return mask[rows][:, columns]


def classes_at(maps: Tensor, size: tuple[int, int], shares: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """The greatest of the channels at each pixel, maps brought to a size bilinearly: (K, h, w) -> int64 (H, W) on the CPU.

    A band of rows at a time: the logits of 150 classes at the size of a large photo would fill the memory.

    Args:
        shares: as in `upsampled`.
    """
    rows, columns = (
        bilinear(cells, side, share).to(maps.device)
        for cells, side, share in zip(maps.shape[1:], size, shares, strict=True)
    )
    wide = maps @ columns.T  # (K, h, W)
    band = max(_MOST // (len(maps) * size[1]), 1)
    return torch.cat([(part @ wide).argmax(0).cpu() for part in torch.split(rows, band)])


def outcome(
    data: Path,
    parts: Sequence[Segmented],
    split: str,
    seeds: Sequence[int],
    scores: Sequence[dict[str, float]],
    matrices: Sequence[Tensor],
    left_out: LeftOut,
) -> Outcome:
    """The result, as means over the seeds.

    Args:
        parts: the images that were used; the last ones were scored.
        scores: of each seed.
        matrices: for each seed, the confusion matrix (K, K) from which the figures of the classes are computed.
    """
    names = parts[-1].classes
    metrics, deviations = mean_and_deviation(scores)
    files = [path for part in parts for pair in part.pairs for path in pair]
    return Outcome(
        metrics,
        described(data, files, len(parts[-1].pairs)),
        tuple(seeds),
        deviations,
        split=split,
        items=mean_items([{"class": class_scores(matrix, names)} for matrix in matrices]),
        absent=absent_classes(matrices[0], names),
        left_out=left_out,
    )
