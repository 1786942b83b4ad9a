"""What the figures have in common: how wide they are, their colors, how small their words may be."""

from __future__ import annotations

import textwrap
from typing import Literal

from matplotlib.colorbar import Colorbar
from matplotlib.layout_engine import ConstrainedLayoutEngine

LineStyle = Literal["-", "--", ":", "-."]
WIDTH = 7.2
"""Inches; that of a page with two columns."""
TITLE, SMALL = 8.5, 7.5
"""Points."""

BLUE, ORANGE = "#0072B2", "#E69F00"
LINES = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "black")
"""Okabe and Ito's palette, told apart without red and green; their yellow is too pale for a line."""
STYLES: tuple[LineStyle, ...] = ("-", "--", ":", "-.")


def tight() -> ConstrainedLayoutEngine:
    """Panels that nearly touch, with room for their labels."""
    return ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)


def wrapped(label: str, inches: float) -> str:
    """Broken into lines of small print that fit in the width."""
    return textwrap.fill(label, max(4, int(inches * 72 / (0.62 * SMALL))))


def name_scale(bar: Colorbar, label: str) -> None:
    """What the colors of a color bar mean."""
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
