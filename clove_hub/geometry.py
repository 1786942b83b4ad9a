"""Where the cells of a feature map lie in the source image, and which cells of two views show the same place.

Boxes are x0, y0, x1, y1 as fractions of the source image. The box of a flipped view has x0 > x1, so that its cells
come out mirrored without a special case. Everything here is a pure function and keeps the dtype of the boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor

Grid = tuple[int, int]
"""Height and width of a feature map, in cells."""


def cell_centres(boxes: Tensor, grid: Grid) -> Tensor:
    """Centres of the cells of a feature map, in row-major order of the cells.

    Args:
        boxes: (..., 4), fractions of the source image.
        grid: cells in height and width.

    Returns:
        (..., H * W, 2), x and y as fractions of the source image.
    """
    height, width = grid
    x0, y0, x1, y1 = boxes.unbind(-1)  # (...) each
    columns = (torch.arange(width, dtype=boxes.dtype, device=boxes.device) + 0.5) / width  # (W)
    rows = (torch.arange(height, dtype=boxes.dtype, device=boxes.device) + 0.5) / height  # (H)
    x = x0[..., None] + (x1 - x0)[..., None] * columns  # (..., W)
    y = y0[..., None] + (y1 - y0)[..., None] * rows  # (..., H)
    x = x[..., None, :].expand(*x.shape[:-1], height, width)  # (..., H, W)
    y = y[..., :, None].expand(*y.shape[:-1], height, width)
    return torch.stack([x, y], -1).flatten(-3, -2)  # (..., H * W, 2)


def cell_diagonal(boxes: Tensor, grid: Grid) -> Tensor:
    """Length of the diagonal of one cell, as a fraction of the source image; (..., 4) -> (...)."""
    height, width = grid
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.hypot((x1 - x0) / width, (y1 - y0) / height)


def match_cells(query_boxes: Tensor, query_grid: Grid, key_boxes: Tensor, key_grid: Grid, distance: float) -> Tensor:
    """Which cells of two views show the same place (CLoVE Eq. 1, PixPro Eq. 1).

    Two cells match where the distance of their centres, divided by the larger of the two cell diagonals, is below
    `distance` (T_pos in the paper). Leading dimensions broadcast, so one call matches every pair of views.

    Args:
        query_boxes: (..., 4), fractions of the source image.
        query_grid: cells of the query view in height and width.
        key_boxes: (..., 4).
        key_grid: cells of the key view in height and width.
        distance: in units of the larger cell diagonal.

    Returns:
        Boolean (..., Hq * Wq, Hk * Wk).
    """
    query = cell_centres(query_boxes, query_grid)  # (..., Nq, 2)
    key = cell_centres(key_boxes, key_grid)  # (..., Nk, 2)
    offset = query.unsqueeze(-2) - key.unsqueeze(-3)  # (..., Nq, Nk, 2)
    diagonal = torch.maximum(cell_diagonal(query_boxes, query_grid), cell_diagonal(key_boxes, key_grid))  # (...)
    # The root of the sum, not the squared comparison: the released code decides borderline cells this way.
    return torch.hypot(offset[..., 0], offset[..., 1]) / diagonal[..., None, None] < distance
