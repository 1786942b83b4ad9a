"""Where the cells of a feature map lie in the source image, and which cells of two views show the same place.

Boxes are x0, y0, x1, y1 as fractions of the source image. The box of a flipped view has x0 > x1, so that its cells
come out mirrored without a special case. Everything here is a pure function and keeps the dtype of the boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor

Grid = tuple[int, int]
"""Height and width of a feature map, in cells."""


def cell_centers(boxes: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Centers of the columns and of the rows of a feature map.

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

    Two cells match where the distance of their centers, divided by the larger of the two cell diagonals, is below
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
    query_x, query_y = cell_centers(query_boxes, query_grid)  # (..., Wq), (..., Hq)
    key_x, key_y = cell_centers(key_boxes, key_grid)  # (..., Wk), (..., Hk)
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


def shared_region(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The regions that views share with other views, as boxes in their own frame.

    Args:
        boxes: (..., 4), fractions of the source image, x0 > x1 where the view is flipped.
        others: (..., 4), the views to share with.

    Returns:
        Boxes (..., 4) as fractions of each view as it is stored, x0 > x1 where it is flipped, so that walking along them
        walks the image from left to right; and a boolean (...), false where the two share nothing.
    """
    (low, high), (other_low, other_high) = (b.view(*b.shape[:-1], 2, 2).aminmax(dim=-2) for b in (boxes, others))
    start, end = torch.maximum(low, other_low), torch.minimum(high, other_high)  # (..., 2)
    origin, extent = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    return torch.cat([(start - origin) / extent, (end - origin) / extent], -1), (start < end).all(-1)


def resample(maps: Tensor, boxes: Tensor) -> Tensor:
    """Resample a region of feature maps: (B, C, H, W) and boxes (B, 4) from `shared_region` -> (B, C, H, W).

    One bilinear sample at the center of each new cell, as in an aligned RoIAlign of a region that is no larger than the
    map (He et al. 2017, section 3). Computed as two matrix products, whose gradient is deterministic.
    """
    height, width = maps.shape[-2:]
    columns, rows = cell_centers(boxes, (height, width))  # (B, W), (B, H), as fractions of the map
    across, down = interpolation(columns, width).to(maps.dtype), interpolation(rows, height).to(maps.dtype)
    return torch.einsum("bjw,bciw->bcij", across, torch.einsum("bih,bchw->bciw", down, maps))


def interpolation(places: Tensor, cells: int) -> Tensor:
    """The weight of each of `cells` cells in linear interpolation: places (..., N) as fractions -> (..., N, cells).

    The weights of a place sum to one. Between a border and the nearest center the value of that cell holds.
    """
    position = (places * cells - 0.5).clamp(0, cells - 1)
    distance = position.unsqueeze(-1) - torch.arange(cells, dtype=places.dtype, device=places.device)
    return (1 - distance.abs()).clamp(min=0)


def upsampled(
    maps: Tensor, size: tuple[int, int], shares: tuple[float, float] = (1.0, 1.0), align_corners: bool = False
) -> Tensor:
    """(..., h, w) -> (..., H, W), as `F.interpolate(..., mode="bilinear")`.

    Computed by matrix products, because the gradient of `F.interpolate` is not deterministic on an accelerator.

    Args:
        shares: the fractions of the height and width that the result covers; the rest is padding.
        align_corners: whether the centers of the outermost cells and pixels coincide, as in `F.interpolate`; only
            without padding.
    """
    rows, columns = (
        bilinear(cells, target, share, align_corners).to(maps.device)
        for cells, target, share in zip(maps.shape[-2:], size, shares, strict=True)
    )
    return rows @ maps @ columns.T


def bilinear(cells: int, size: int, share: float = 1.0, align_corners: bool = False) -> Tensor:
    """The matrix (size, cells) that resizes a line of cells, of which the result covers a part."""
    pixels = torch.arange(size, dtype=torch.float64)
    if align_corners:
        places = pixels * ((cells - 1) / max(size - 1, 1))
    else:
        places = ((pixels + 0.5) * (cells * share / size) - 0.5).clamp(0, cells - 1)
    return (1 - (places[:, None] - torch.arange(cells)).abs()).clamp(min=0).float()
