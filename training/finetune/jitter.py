"""Large-scale jitter (Ghiasi et al., "Simple Copy-Paste", CVPR 2021).

An image and its boxes, masks and keypoints are resized by a random factor and cropped to a square.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Target = dict[str, Tensor]


@dataclass(frozen=True)
class Jitter:
    side: int
    """Side of the square in pixels."""
    scale: tuple[float, float]
    """The range of the random factor."""
    color: tuple[int, int, int]
    """Color outside the image."""


def jittered(image: Tensor, target: Target, jitter: Jitter, draws: NDArray[np.float64]) -> tuple[Tensor, Target]:
    """A square view; objects are clipped to it, and those outside are removed.

    Args:
        image: (3, H, W) uint8.
        target: as returned by `dataset.target_of`.
        draws: three uniform numbers, for factor, row and column.

    Returns:
        The view (3, side, side) uint8, and its target.
    """
    side, (low, high) = jitter.side, jitter.scale
    before = image.shape[1:]
    factor = (low + (high - low) * draws[0]) * min(side / length for length in before)
    height, width = (max(round(length * factor), 1) for length in before)
    pixels = F.interpolate(image[None].float(), (height, width), mode="bilinear", antialias=True)[0]
    top, left = (
        int(draw * (max(length - side, 0) + 1)) for draw, length in zip(draws[1:], (height, width), strict=True)
    )
    seen = pixels[:, top : top + side, left : left + side].round().clamp(0, 255).to(torch.uint8)
    rows, columns = seen.shape[1:]
    view = torch.tensor(jitter.color, dtype=torch.uint8).view(3, 1, 1).repeat(1, side, side)
    view[:, :rows, :columns] = seen

    stretch = torch.tensor([width / before[1], height / before[0]])
    corner, limit = torch.tensor([left, top]), torch.tensor([columns, rows])
    boxes = target["boxes"].view(-1, 2, 2) * stretch - corner
    boxes = torch.minimum(boxes.clamp(min=0), limit).to(target["boxes"].dtype).flatten(1)
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    result = target | {"boxes": boxes[kept], "labels": target["labels"][kept]}
    if "masks" in target:
        # For each pixel of the view the nearest one of the mask; there may be no mask at all.
        down = ((torch.arange(rows) + top + 0.5) / stretch[1]).long().clamp(max=before[0] - 1)
        right = ((torch.arange(columns) + left + 0.5) / stretch[0]).long().clamp(max=before[1] - 1)
        masks = target["masks"][kept][:, down][:, :, right]
        result["masks"] = F.pad(masks, (0, side - columns, 0, side - rows))
    if "keypoints" in target:
        points = target["keypoints"][kept].clone()
        points[..., :2] = points[..., :2] * stretch - corner
        inside = ((points[..., :2] >= 0) & (points[..., :2] < limit)).all(-1) & (points[..., 2] > 0)
        result["keypoints"] = torch.where(inside[..., None], points, 0.0)
    return view, result
