"""Panels in rows below their headings, placed in inches so that no text is cut off and no picture distorted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from .output import WIDTH
from .style import bare
from .words import SMALL, TITLE, printed_height, wrapped

MARGIN, GAP = 0.06, 0.04
"""Inches around everything, and between panels."""
TALLEST = 2.6
"""Inches of a panel: few of them do not fill the width."""
SCALE = 0.46
"""Inches that a scale takes."""


class Row(NamedTuple):
    """Panels of one height beside each other."""

    ratios: Sequence[float]
    """Of each panel, width by height."""
    heading: str = ""
    """Above all of them, from the left."""
    titles: Sequence[str] = ()
    """Above each of them, or none."""


class Sheet(NamedTuple):
    figure: Figure
    panels: list[list[Axes]]
    """Of each row."""
    free: tuple[float, float, float, float]
    """What is left free below the panels: left, bottom, width and height as fractions of the figure."""


def sheet(rows: Sequence[Row], width: float = WIDTH, note: str = "", below: float = 0) -> Sheet:
    """A figure with the panels of each row, which have neither axes nor frame.

    Args:
        rows: from the top.
        width: in inches; the figure is narrower where its panels would become too tall.
        note: small print at the bottom.
        below: inches that are left free between the panels and the note.
    """
    room = width - 2 * MARGIN
    heights = [min(TALLEST, (room - _gaps(row)) / sum(row.ratios)) for row in rows]
    room = max(height * sum(row.ratios) + _gaps(row) for row, height in zip(rows, heights, strict=True))
    y = MARGIN  # from the top, as all that follows
    words: list[tuple[float, str, float]] = []
    panels: list[tuple[float, float, float, float, str]] = []
    for row, height in zip(rows, heights, strict=True):
        if row.heading:
            heading = wrapped(row.heading, room, TITLE, bold=True)
            y += 2 * GAP if panels else 0
            words.append((y, heading, TITLE))
            y += printed_height(heading, TITLE)
        titles = [wrapped(*each) for each in zip(row.titles, (height * ratio for ratio in row.ratios), strict=False)]
        y += max(map(printed_height, titles), default=0)
        x = MARGIN
        for number, ratio in enumerate(row.ratios):
            panels.append((x, y, height * ratio, height, titles[number] if titles else ""))
            x += height * ratio + GAP
        y += height + GAP
    free = y, below
    y += below
    if note:
        note = wrapped(note, room, lines=9)
        words.append((y, note, SMALL))
        y += printed_height(note)
    wide, high = room + 2 * MARGIN, y + MARGIN

    figure = Figure(figsize=(wide, high))
    for top, text, points in words:
        weight = "bold" if points == TITLE else "normal"
        where = MARGIN / wide, 1 - top / high
        figure.text(*where, text, va="top", fontsize=points, fontweight=weight, parse_math=False)
    drawn = []
    for left, top, w, h, title in panels:
        axes = figure.add_axes((left / wide, 1 - (top + h) / high, w / wide, h / high))
        axes.set_title(title, fontsize=SMALL, pad=2.5, parse_math=False)
        bare(axes)
        drawn.append(axes)
    left_over = iter(drawn)
    return Sheet(
        figure,
        [[next(left_over) for _ in row.ratios] for row in rows],
        (MARGIN / wide, 1 - sum(free) / high, room / wide, below / high),
    )


def _gaps(row: Row) -> float:
    return GAP * (len(row.ratios) - 1)


def add_scale(on: Sheet, colored: AxesImage, label: str, extend: Literal["min", "max"]) -> None:
    """A color bar at the bottom of what is free, and what its colors mean; it takes `SCALE` inches."""
    wide, high = on.figure.get_size_inches()
    left, bottom, room, _ = on.free
    long = min(3.0 / wide, 0.8 * room)
    axes = on.figure.add_axes((left + (room - long) / 2, bottom + 0.32 / high, long, 0.08 / high))
    bar = on.figure.colorbar(colored, cax=axes, orientation="horizontal", extend=extend)
    bar.set_label(label, fontsize=SMALL, labelpad=1.5)
    axes.tick_params(labelsize=SMALL, length=2, pad=1.5)
