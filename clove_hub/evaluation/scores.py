"""The metrics, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def confusion(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """The number of pixels of each true class (rows) predicted as each class (columns): int64 (K, K).

    Args:
        predicted: classes from 0 to K - 1.
        truth: of the same shape; whatever is not from 0 to K - 1 is void and does not count.
    """
    truth, predicted = truth.long().flatten(), predicted.long().flatten()
    counted = (truth >= 0) & (truth < classes)
    return torch.bincount(truth[counted] * classes + predicted[counted], minlength=classes**2).view(classes, classes)


def absent_classes(matrix: Tensor, names: Sequence[str]) -> tuple[str, ...]:
    """The classes without a pixel in the truth, from a confusion matrix (K, K)."""
    return tuple(name for name, count in zip(names, matrix.sum(1).tolist(), strict=True) if not count)


def segmentation_scores(matrix: Tensor, absent_as_zero: bool = False) -> dict[str, float]:
    """mIoU and pixel accuracy, in percent, from a confusion matrix (K, K).

    The mean is over the classes that occur, in the truth or in the prediction, as PASCAL VOC's and Cityscapes' is over
    data in which all occur, and as mmseg's is.

    Args:
        absent_as_zero: whether a class that does not occur counts 0 in the mean, as in the code of MaskContrast, Leopart and
            Hummingbird.
    """
    ious = class_ious(matrix)
    occurs = ~ious.isnan()
    assert bool(occurs.any()), "no pixel has a class"
    return {
        "mIoU": zero_miou(matrix) if absent_as_zero else 100 * float(ious[occurs].mean()),
        "pixel accuracy": 100 * float(matrix.double().diagonal().sum() / matrix.sum()),
    }


def class_ious(matrix: Tensor) -> Tensor:
    """Intersection over union of each class, in [0, 1], from a confusion matrix (K, K): float64 (K,).

    NaN for a class that occurs neither in the truth nor in the prediction.
    """
    matrix = matrix.double()
    right = matrix.diagonal()
    return right / (matrix.sum(0) + matrix.sum(1) - right)


def zero_miou(matrix: Tensor) -> float:
    """Mean intersection over union in percent, in which an absent class counts 0: Leopart's and Hummingbird's.

    Args:
        matrix: a confusion matrix (K, K).
    """
    return 100 * float(class_ious(matrix).nan_to_num(0).mean())


def hungarian() -> Any:
    """SciPy's Hungarian method.

    Raises:
        ValueError: SciPy is not installed.
    """
    try:
        return import_module("scipy.optimize").linear_sum_assignment
    except ImportError as error:
        raise ValueError("matching clusters and classes needs SciPy: pip install 'clove-hub[evaluation]'") from error


def one_to_one(matrix: Tensor) -> Tensor:
    """The class of each cluster, int64 (C,), by the Hungarian method on intersection over union; 0 for unmatched ones.

    Args:
        matrix: how many pixels of each class (rows) are in which cluster: int64 (K, C).

    Raises:
        ValueError: SciPy is not installed.
    """
    assign = hungarian()
    counts = matrix.double()
    union = counts.sum(0) + counts.sum(1, keepdim=True) - counts
    rows, columns = assign((counts / union.clamp(min=1)).numpy(), maximize=True)
    classes = torch.zeros(matrix.shape[1], dtype=torch.int64)
    classes[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return classes


def many_to_one(matrix: Tensor) -> Tensor:
    """The class of most pixels of each cluster, int64 (C,); the first in a tie.

    Args:
        matrix: how many pixels of each class (rows) are in which cluster: int64 (K, C).
    """
    return matrix.argmax(0)


def merged(matrix: Tensor, classes: Tensor) -> Tensor:
    """The confusion matrix (K, K) after each cluster is assigned to a class: int64 (K, C) and (C,)."""
    return torch.zeros(len(matrix), len(matrix), dtype=matrix.dtype).index_add_(1, classes, matrix)


def class_scores(matrix: Tensor, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """`IoU` (percent) of each class that occurs, in the truth or in the prediction, and its `pixels` in the truth.

    Args:
        matrix: a confusion matrix (K, K).
        names: of the K classes.
    """
    figures = zip(names, class_ious(matrix).tolist(), matrix.sum(1).tolist(), strict=True)
    return {name: {"IoU": 100 * iou, "pixels": pixels} for name, iou, pixels in figures if not math.isnan(iou)}


def average_precision(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> float:
    """Area under the precision-recall curve made monotone, in [0, 1]: VOC's since 2010, and VISSL's for VOC07.

    It is not the 11-point mean of VOC 2007's own development kit. Of equal scores the later image comes first.

    Args:
        scores: of each image, (N,).
        positive: whether the class is in it, (N,), at least once.
    """
    assert positive.any(), "average precision needs a positive"
    order = np.argsort(scores, kind="stable")[::-1]
    hits = np.cumsum(positive[order])
    recall = hits / positive.sum()
    precision = hits / np.arange(1, len(scores) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or a higher one
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def region_similarity(predicted: Tensor, truth: Tensor) -> float:
    """J of DAVIS (Perazzi et al., CVPR 2016): intersection over union of two masks, bool (H, W); 1 if both are empty."""
    union = int((predicted | truth).sum())
    return int((predicted & truth).sum()) / union if union else 1.0


def boundary_accuracy(predicted: Tensor, truth: Tensor, tolerance: float = 0.008) -> float:
    """F of DAVIS: F-measure of the boundary pixels of two masks, bool (H, W), that lie near the other's boundary.

    Near is within a disk whose radius is `tolerance` times the image's diagonal, rounded up to whole pixels. With one
    boundary empty F is 0, with both it is 1.
    """
    radius = math.ceil(tolerance * math.hypot(*truth.shape))
    ours, theirs = boundary(predicted), boundary(truth)
    found, wanted = int(ours.sum()), int(theirs.sum())
    if not found or not wanted:
        return float(found == wanted)
    precision = int((ours & _dilated(theirs, radius)).sum()) / found
    recall = int((theirs & _dilated(ours, radius)).sum()) / wanted
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def over_frames(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean, recall and decay over the frames of a clip, as in DAVIS: (frames, ...) -> (3, ...).

    Recall is the share of frames with a value above 0.5; decay is the mean of the first of four parts of the clip minus
    that of the last. The parts share their first and last frames.
    """
    edges = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(int)
    first, last = values[edges[0] : edges[1] + 1], values[edges[3] : edges[4] + 1]
    return np.stack([values.mean(0), (values > 0.5).mean(0), first.mean(0) - last.mean(0)])


def boundary(mask: Tensor) -> Tensor:
    """The pixels that differ from the one to the right, below or both, as DAVIS takes them: bool (H, W) -> bool (H, W).

    In the last row only the pixel to the right counts, in the last column only the one below, in the corner none.
    """
    result = torch.zeros_like(mask)
    result[:, :-1] |= mask[:, :-1] ^ mask[:, 1:]
    result[:-1] |= mask[:-1] ^ mask[1:]
    result[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return result


def _dilated(mask: Tensor, radius: int) -> Tensor:
    """What lies within `radius` pixels of the mask, itself included."""
    steps = torch.arange(-radius, radius + 1, device=mask.device)
    disk = (steps[:, None] ** 2 + steps**2 <= radius**2).nonzero() - radius  # (D, 2)
    places = (mask.nonzero()[:, None] + disk).flatten(0, 1)  # boundaries are thin: few pixels, a disk around each
    sides = torch.tensor(mask.shape, device=mask.device)
    rows, columns = places[((places >= 0) & (places < sides)).all(1)].T
    result = torch.zeros_like(mask)
    result[rows, columns] = True
    return result


def mean_and_deviation(rows: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean of each metric over the seeds, and its sample standard deviation, which one seed has none of."""
    values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    means = {name: float(column.mean()) for name, column in values.items()}
    return means, {name: float(column.std(ddof=1)) for name, column in values.items()} if len(rows) > 1 else {}
