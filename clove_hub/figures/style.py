"""What the figures have in common: how wide they are, their colors, how small their words may be.

Masks are shown as classes in flat colors, as objects tinted on their photo, or as outlines. Classes have Okabe and Ito's
colors, then darker and lighter ones, which are told apart by their lightness.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # (H, W, 3)
Mask = NDArray[np.integer]  # (H, W)
Colors = NDArray[np.uint8]  # (K, 3)

LineStyle = Literal["-", "--", ":", "-."]
WIDTH = 7.2
"""Inches; that of a page with two columns."""
TITLE, SMALL = 8.5, 7.5
"""Points."""

SKY, RED, YELLOW, BLUE = "#56B4E9", "#D55E00", "#F0E442", "#0072B2"
PURPLE, GREEN, ORANGE = "#CC79A7", "#009E73", "#E69F00"
LINES = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, "black")
"""Okabe and Ito's palette, told apart without red and green; their yellow is too pale for a line."""
STYLES: tuple[LineStyle, ...] = ("-", "--", ":", "-.")
CLASSES = (SKY, RED, YELLOW, BLUE, PURPLE, GREEN, ORANGE)
OBJECTS = (SKY, ORANGE, PURPLE, YELLOW, GREEN, RED, BLUE)
"""Those first that most photos have little of."""


def tight(pad: float = 0.02, space: float = 0) -> ConstrainedLayoutEngine:
    """Panels that nearly touch, with room for their labels; inches around them, and a share of their size between."""
    return ConstrainedLayoutEngine(w_pad=pad, h_pad=pad, wspace=space, hspace=space)


def wrapped(label: str, inches: float) -> str:
    """Broken into lines of small print that fit in the width."""
    return textwrap.fill(label, max(4, int(inches * 72 / (0.62 * SMALL))))


def add_scale(figure: Figure, colored: AxesImage, label: str, extend: Literal["min", "max"]) -> None:
    """A color bar below all panels, and what its colors mean."""
    bar = figure.colorbar(colored, ax=figure.axes, location="bottom", shrink=0.4, aspect=40, pad=0.01, extend=extend)
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)


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
