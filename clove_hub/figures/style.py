"""The common style of all figures: widths, colors, font sizes, axes and legends.

Masks are shown as classes in flat colors, as objects tinted on their photo, or as outlines. Classes have Okabe and
Ito's colors, then darker and lighter ones, which differ in lightness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import FigureBase
from numpy.typing import NDArray

from .words import SMALL, TITLE, printed_width, wrapped

Image = NDArray[np.uint8]  # (H, W, 3)
Mask = NDArray[np.integer]  # (H, W)
Colors = NDArray[np.uint8]  # (K, 3)

LineStyle = Literal["-", "--", ":", "-."]
KEY, LEGEND_LINE = 0.45, 0.15
"""Inches that an entry of a legend takes beside its words, and a line of them."""
BESIDE = 0.65
"""Inches of a panel with axes that are not between them."""
LEGEND: dict[str, Any] = {
    "fontsize": SMALL, "frameon": False, "handlelength": 1.6, "columnspacing": 1.4, "labelspacing": 0.25,
    "borderpad": 0.2, "borderaxespad": 0.2,
}  # fmt: skip

SKY, RED, YELLOW, BLUE = "#56B4E9", "#D55E00", "#F0E442", "#0072B2"
PURPLE, GREEN, ORANGE = "#CC79A7", "#009E73", "#E69F00"
LINES = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, "black")
"""Okabe and Ito's palette for color-blind readers, without their yellow, which is too pale for a line."""
STYLES: tuple[LineStyle, ...] = ("-", "--", ":", "-.")
CLASSES = (SKY, RED, YELLOW, BLUE, PURPLE, GREEN, ORANGE)
OBJECTS = (SKY, ORANGE, PURPLE, YELLOW, GREEN, RED, BLUE)
"""Those first that most photos have little of."""


def graph(axes: Axes, title: str, x: str, y: str, inches: float) -> None:
    """The look of a panel with axes.

    Args:
        x: what lies across, with its unit.
        y: what goes up, with its unit.
        inches: that the panel is wide, with the words beside it.
    """
    axes.set_title(wrapped(title, inches - BESIDE, TITLE), fontsize=TITLE, loc="left", parse_math=False)
    axes.set_xlabel(x, fontsize=SMALL)
    axes.set_ylabel(wrapped(y, 1.0), fontsize=SMALL)
    axes.tick_params(labelsize=SMALL, length=2.5, width=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_linewidth(0.6)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def add_key(axes: Axes, handles: Sequence[Artist], inches: float) -> None:
    """What the lines of one panel are, between its title and what is drawn in it.

    Args:
        inches: that the panel is wide, with the words beside it.
    """
    columns = legend_columns([str(handle.get_label()) for handle in handles], inches - BESIDE)
    lines = -(-len(handles) // columns)
    axes.set_title(axes.get_title("left"), fontsize=TITLE, loc="left", pad=4 + 72 * LEGEND_LINE * lines)
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, **LEGEND)


def legend_labels(labels: Sequence[str], width: float) -> list[str]:
    """As they are written below a figure that is `width` inches wide."""
    return [wrapped(label, width - 0.2 - KEY, lines=2) for label in labels]


def legend_columns(labels: Sequence[str], inches: float) -> int:
    """How many columns of a legend fit beside each other."""
    return max(1, min(len(labels), int(inches / (max(map(printed_width, labels)) + KEY))))


def legend_height(labels: Sequence[str], width: float) -> float:
    """Inches that a legend takes below a figure that is `width` inches wide."""
    written = legend_labels(labels, width)
    rows = -(-len(written) // legend_columns(written, width - 0.2))
    return LEGEND_LINE * rows * max(label.count("\n") + 1 for label in written) + 0.1


def add_legend(
    figure: FigureBase, handles: Sequence[Artist], width: float, within: tuple[float, float, float, float] | None = None
) -> None:
    """What the colors mean: below all panels of a constrained layout, which make room for it.

    Args:
        width: in inches.
        within: where else: left, bottom, width and height as fractions of the figure.
    """
    labels = legend_labels([str(handle.get_label()) for handle in handles], width)
    legend = figure.legend(
        handles=handles, labels=labels, ncols=legend_columns(labels, width - 0.2), bbox_to_anchor=within,
        loc="center" if within else "outside lower center", **LEGEND,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def to_colors(names: Sequence[str]) -> Colors:
    return np.round(255 * np.array([to_rgb(name) for name in names])).astype(np.uint8)


OBJECT_COLORS = to_colors(OBJECTS)


def class_colors(count: int) -> Colors:
    """A color for each class; those of 21 classes differ."""
    base = to_colors(CLASSES)
    shades = np.concatenate([base, base // 2, 128 + base // 2])
    return shades[np.arange(count) % len(shades)]


def flat(mask: Mask, colors: Colors) -> Image:
    """Each pixel in the color of its class, (H, W, 3); what is no class is white."""
    table = np.concatenate([colors, np.full((1, 3), 255, dtype=np.uint8)])
    return table[np.where(mask < len(colors), mask, len(colors))]


def tinted(image: Image, mask: Mask, colors: Colors, strength: float = 0.55) -> Image:
    """The photo, where an object is mixed with the color of its number; 0 is the background.

    Args:
        colors: of the objects 1, 2, ..., and again from the first.
    """
    color = colors[(mask - 1) % len(colors)]
    mixed = np.round((1 - strength) * image + strength * color).astype(np.uint8)
    return np.where(mask[:, :, None] > 0, mixed, image)


def faded(image: Image, mask: NDArray[np.bool_], strength: float = 0.6) -> Image:
    """The photo, gray and pale outside the mask."""
    gray = image.mean(2, keepdims=True)
    pale = np.round((1 - strength) * gray + strength * 255).astype(np.uint8)
    return np.where(mask[:, :, None], image, pale)


def bare(axes: Axes) -> None:
    """Leaves a panel nothing but what is drawn in it."""
    axes.set(xticks=[], yticks=[], frame_on=False)


def outlined(axes: Axes, mask: NDArray[np.bool_], color: str, width: float) -> None:
    """The edge of a mask as a line; there is none where the mask ends with the picture."""
    if mask.any() and not mask.all():
        axes.contour(mask, levels=[0.5], colors=[color], linewidths=width)


def caption(axes: Axes, text: str) -> None:
    """A few words in the lower left corner of a picture."""
    axes.text(
        *(0.03, 0.04, text),
        transform=axes.transAxes, va="bottom", fontsize=7, color="white",
        bbox={"facecolor": "black", "edgecolor": "none", "alpha": 0.65, "pad": 1.2},
    )  # fmt: skip
