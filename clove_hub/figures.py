"""Pictures of a run and of what a backbone has learned.

Each function draws into a matplotlib figure and returns it; nothing is shown or saved here, and no global state of
matplotlib is touched. Colours are told apart without red and green (Okabe and Ito's palette, viridis).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clove_hub.geometry import Grid, cell_centres, match_cells
from clove_hub.views import DeviceViews, Draw, ViewSpec, allocate, draw, write_sample

Image = NDArray[np.uint8]  # (H, W, 3)

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"


def training_curve(metrics: Sequence[Mapping[str, float]]) -> Figure:
    """Loss, cosines and spread over the steps of a run, from the rows of its metrics.jsonl."""
    steps = [row["step"] for row in metrics]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    loss, cosine = figure.subplots(1, 2)
    loss.plot(steps, [row["loss"] for row in metrics], color=BLUE)
    loss.set(title="Loss", xlabel="step", ylabel="loss")
    for key, label, colour, style in (
        ("positive_cosine", "matched cells", BLUE, "-"),
        ("negative_cosine", "hard negatives", ORANGE, "--"),
        ("embedding_spread", "spread of the teacher (0 = collapsed)", GREEN, ":"),
    ):
        cosine.plot(steps, [row[key] for row in metrics], style, color=colour, label=label)
    cosine.set(title="Cosine to the teacher", xlabel="step", ylim=(-0.35, 1.05))
    cosine.legend(fontsize=8)
    for axes in (loss, cosine):
        axes.grid(alpha=0.25)
    return figure


def matched_cells(image: Image, spec: ViewSpec, pair: tuple[int, int], grid: Sequence[Grid], distance: float) -> Figure:
    """Two views of a photo as a method sees them, and which of their cells show the same place.

    Args:
        image: (H, W, 3).
        spec: the views; those numbered `pair` are drawn.
        grid: cells of the feature map of each of the two, in height and width.
        distance: T_pos, in units of the larger cell diagonal.
    """
    sample = overlapping_draw(image, spec, pair, grid, distance)
    batch = allocate(spec, 1)
    write_sample(batch, 0, image, sample)
    pixels = [view for group in DeviceViews(spec)(batch) for view in group.pixels[:, 0]]
    boxes = torch.from_numpy(sample.boxes[list(pair)])  # (2, 4)
    match = match_cells(boxes[0], grid[0], boxes[1], grid[1], distance)  # (N0, N1)

    figure = Figure(figsize=(11, 4), layout="constrained")
    whole, left, right = figure.subplots(1, 3)
    whole.imshow(image)
    whole.set_title("Photo and crops")
    for box, colour, name in zip(boxes.tolist(), (BLUE, ORANGE), "AB", strict=True):
        outline(whole, box, image.shape[:2], colour, name)
    hues = place_colours(*cell_centres(boxes[0], grid[0]))  # (N0, 3)
    found = match.any(0)
    for axes, view, cells, colours, title in (
        (left, pair[0], grid[0], np.where(match.any(1).numpy()[:, None], hues, np.nan), "View A: matched cells"),
        (right, pair[1], grid[1], mean_colours(match, hues), f"View B: the same places ({int(found.sum())} cells)"),
    ):
        axes.imshow(displayed(pixels[view], spec))
        paint_cells(axes, colours, cells, pixels[view].shape[-1])
        axes.set_title(title)
    for axes in (whole, left, right):
        axes.set_axis_off()
    return figure


def pca_maps(images: Sequence[Image], features: Sequence[Tensor], titles: Sequence[str]) -> Figure:
    """Photos above the first three principal components of their feature maps, as red, green and blue.

    The components are those of all maps together, so that the same colour means a similar feature in every photo.

    Args:
        images: each (H, W, 3).
        features: for each image a map (C, h, w).
        titles: for each image.
    """
    flat = torch.cat([f.flatten(1).T.double() for f in features])  # (cells of all maps, C)
    centred = flat - flat.mean(0)
    _, _, axes_of_variance = torch.linalg.svd(centred, full_matrices=False)
    scores = centred @ axes_of_variance[:3].T  # (cells, 3)
    low, high = scores.quantile(0.02, 0), scores.quantile(0.98, 0)
    colours = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)

    figure = Figure(figsize=(2.6 * len(images), 5), layout="constrained")
    rows = figure.subplots(2, len(images), squeeze=False)
    start = 0
    for column, (image, feature, title) in enumerate(zip(images, features, titles, strict=True)):
        _, height, width = feature.shape
        block = colours[start : start + height * width].view(height, width, 3)
        start += height * width
        rows[0, column].imshow(image)
        rows[0, column].set_title(title, fontsize=9)
        smooth = F.interpolate(block.permute(2, 0, 1)[None], size=image.shape[:2], mode="bilinear")[0]
        rows[1, column].imshow(smooth.permute(1, 2, 0).clamp(0, 1).numpy())
        for axes in rows[:, column]:
            axes.set_axis_off()
    return figure


# ---- pieces of the pictures ------------------------------------------------------------------------------------------


def overlapping_draw(
    image: Image, spec: ViewSpec, pair: tuple[int, int], grid: Sequence[Grid], distance: float
) -> Draw:
    """The first draw, of the first hundred, whose two views share a fair number of cells without being the same."""
    draws = [draw(spec, 0, 0, index, *image.shape[:2]) for index in range(100)]

    def shared(sample: Draw) -> float:
        a, b = torch.from_numpy(sample.boxes[list(pair)])
        return float(match_cells(a, grid[0], b, grid[1], distance).any(1).float().mean())

    return next((sample for sample in draws if 0.25 < shared(sample) < 0.7), draws[0])


def displayed(pixels: Tensor, spec: ViewSpec) -> NDArray[np.float32]:
    """Normalised (3, S, S) -> (S, S, 3) in [0, 1]."""
    mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
    shown: NDArray[np.float32] = (pixels * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    return shown


def outline(axes: Axes, box: Sequence[float], shape: tuple[int, ...], colour: str, name: str) -> None:
    """A crop's box on the photo, named; a flipped one is marked."""
    height, width = shape
    x0, y0, x1, y1 = box[0] * (width - 1), box[1] * (height - 1), box[2] * (width - 1), box[3] * (height - 1)
    axes.add_patch(Polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill=False, edgecolor=colour, linewidth=2.5))
    label = f"{name} (flipped)" if x0 > x1 else name
    axes.text(min(x0, x1) + 4, y0 + 4, label, color="white", va="top", fontsize=9, bbox={"facecolor": colour, "pad": 2})


def place_colours(columns: Tensor, rows: Tensor) -> NDArray[np.float64]:
    """(W,) and (H,) -> (H * W, 3): hue by the direction from the middle of the cells, saturation by the distance."""
    offset = torch.cartesian_prod(rows - rows.mean(), columns - columns.mean()).double().numpy()[:, ::-1]
    hue = (np.arctan2(offset[:, 1], offset[:, 0]) / (2 * np.pi)) % 1
    radius = np.hypot(*offset.T)
    saturation = 0.25 + 0.75 * radius / max(radius.max(), 1e-12)
    colours: NDArray[np.float64] = hsv_to_rgb(np.stack([hue, saturation, np.ones_like(hue)], 1))
    return colours


def mean_colours(match: Tensor, colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each key cell the mean colour of the query cells that match it, NaN where none does: (N1, 3)."""
    weight = match.double().numpy()  # (N0, N1)
    total = weight.sum(0)[:, None]
    return np.where(total > 0, weight.T @ colours / np.maximum(total, 1), np.nan)


def paint_cells(axes: Axes, colours: NDArray[np.float64], grid: Grid, size: int) -> None:
    """Half-transparent cells over a view of `size` pixels; those whose colour is NaN are darkened."""
    alpha = np.where(np.isnan(colours[:, :1]), 0.6, 0.5)
    cells = np.concatenate([np.nan_to_num(colours), alpha], 1).reshape(*grid, 4)
    axes.imshow(cells, extent=(-0.5, size - 0.5, size - 0.5, -0.5), interpolation="nearest")
    for position in range(1, grid[1]):
        axes.axvline(position * size / grid[1] - 0.5, color="white", linewidth=0.4)
    for position in range(1, grid[0]):
        axes.axhline(position * size / grid[0] - 0.5, color="white", linewidth=0.4)
