"""Results of several models side by side, a panel for each table of what may be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .output import WIDTH
from .style import BESIDE, LINES, add_legend, graph, legend_height
from .words import wrapped

HEIGHT = 2.1
"""Inches of a panel without its legend."""
HATCHES = ("", "////", "....", "xxxx")
"""Of the first bars, of those that have the first colors again, and so on."""


class Bar(NamedTuple):
    """A model's figures."""

    label: str
    values: Mapping[str, float]
    """By the names of the metrics, of which it may lack some."""
    deviations: Mapping[str, float]
    """Likewise; of the metrics that have one."""


class Table(NamedTuple):
    """Models that may be compared."""

    title: str
    unit: str
    metrics: Sequence[str]
    rows: Sequence[Bar]


def bars(tables: Sequence[Table], width: float = WIDTH) -> Figure:
    """The metrics of each table side by side, a color for each model, deviations as whiskers, and below it the models.

    Args:
        width: inches.
    """
    heights = [HEIGHT + legend_height([row.label for row in table.rows], width) for table in tables]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    models = list(dict.fromkeys(row.label for table in tables for row in table.rows))
    for part, table in zip(parts, tables, strict=True):
        axes = part.subplots()
        wide = 0.8 / len(table.rows)
        keys = []
        for number, row in enumerate(table.rows):
            index = models.index(row.label)  # one has the same color in all tables
            color, hatch = LINES[index % len(LINES)], HATCHES[index // len(LINES) % len(HATCHES)]
            places = [place + (number - (len(table.rows) - 1) / 2) * wide for place in range(len(table.metrics))]
            values = [row.values.get(name, math.nan) for name in table.metrics]
            errors = [row.deviations.get(name, 0.0) for name in table.metrics] if row.deviations else None
            axes.bar(
                *(places, values, wide), yerr=errors, edgecolor="white", linewidth=0.4,
                error_kw={"elinewidth": 0.8, "capsize": 2, "capthick": 0.8}, color=color, hatch=hatch,
            )  # fmt: skip
            keys.append(Patch(label=row.label, facecolor=color, hatch=hatch, edgecolor="white"))
        graph(axes, table.title, "", table.unit, width)
        axes.grid(visible=False, axis="x")
        slot = (width - BESIDE) / len(table.metrics)
        axes.set_xticks(range(len(table.metrics)), [wrapped(name, 0.9 * slot, lines=4) for name in table.metrics])
        axes.set_xlim(-0.5, len(table.metrics) - 0.5)
        add_legend(part, keys, width)
    return figure
