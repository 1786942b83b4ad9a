"""Bilinear resizing by matrices: the gradient of `F.interpolate` is not deterministic on an accelerator."""

from __future__ import annotations

import torch
from torch import Tensor


def upsampled(maps: Tensor, size: tuple[int, int], shares: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """(..., h, w) -> (..., H, W), as `F.interpolate(..., mode="bilinear", align_corners=False)`.

    Args:
        shares: the part of the height and of the width that the result covers; what is beyond is padding.
    """
    rows, columns = (
        bilinear(cells, target, share).to(maps.device)
        for cells, target, share in zip(maps.shape[-2:], size, shares, strict=True)
    )
    return rows @ maps @ columns.T


def bilinear(cells: int, size: int, share: float = 1.0) -> Tensor:
    """The matrix (size, cells) that resizes a line of cells, of which the result covers a part."""
    places = ((torch.arange(size, dtype=torch.float64) + 0.5) * (cells * share / size) - 0.5).clamp(0, cells - 1)
    return (1 - (places[:, None] - torch.arange(cells)).abs()).clamp(min=0).float()
