"""Where the cells of a feature map lie in the source image, and which cells of two views show the same place.

Boxes are x0, y0, x1, y1 as fractions of the source image. The box of a flipped view has x0 > x1, so that its cells
come out mirrored without a special case. Everything here is a pure function and keeps the dtype of the boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor

Grid = tuple[int, int]
"""Height and width of a feature map, in cells."""


def cell_centres(boxes: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Centres of the columns and of the rows of a feature map.

    Args:
        boxes: (..., 4), fractions of the source image.
        grid: cells in height and width.

    Returns:
        x of the columns (..., W) and y of the rows (..., H), as fractions of the source image.
    """
    height, width = grid
    x0, y0, x1, y1 = boxes.unsqueeze(-1).unbind(-2)  # (..., 1) each
    columns = (torch.arange(width, dtype=boxes.dtype, device=boxes.device) + 0.5) / width
    rows = (torch.arange(height, dtype=boxes.dtype, device=boxes.device) + 0.5) / height
    return x0 + (x1 - x0) * columns, y0 + (y1 - y0) * rows


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
        Boolean (..., Hq * Wq, Hk * Wk), cells in row-major order.
    """
    query_x, query_y = cell_centres(query_boxes, query_grid)  # (..., Wq), (..., Hq)
    key_x, key_y = cell_centres(key_boxes, key_grid)  # (..., Wk), (..., Hk)
    # Squared distances are sums of one part for the columns and one for the rows, which are small.
    across = (query_x.unsqueeze(-1) - key_x.unsqueeze(-2)).square()  # (..., Wq, Wk)
    down = (query_y.unsqueeze(-1) - key_y.unsqueeze(-2)).square()  # (..., Hq, Hk)
    diagonal = torch.maximum(cell_diagonal(query_boxes, query_grid), cell_diagonal(key_boxes, key_grid))  # (...)
    limit = (distance * diagonal).square()[..., None, None]
    room = limit - down  # (..., Hq, Hk): across + down < limit is across < room
    # Both spread over all keys first, which are few yet: then the one pass over all pairs of cells has long rows.
    across = across.unsqueeze(-2).expand(*across.shape[:-1], key_grid[0], key_grid[1]).flatten(-2)  # (..., Wq, Nk)
    room = room.unsqueeze(-1).expand(*room.shape, key_grid[1]).flatten(-2)  # (..., Hq, Nk)
    return (across.unsqueeze(-3) < room.unsqueeze(-2)).flatten(-3, -2)  # (..., Hq, Wq, Nk) -> (..., Nq, Nk)
