"""Results of several models side by side, a panel for each table of what may be compared (`clove-hub results --plot`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from clove_hub.evaluation.collected import Row, differing_settings, shown_metrics, tables, weights_of
from clove_hub.evaluation.result import UNITS

from .output import WIDTH
from .style import BESIDE, LINES, add_legend, graph, legend_height
from .words import wrapped

HEIGHT = 2.1
"""Inches of a panel without its legend."""
HATCHES = ("", "////", "....", "xxxx")
"""Of the first models, of those that have the first colors again, and so on."""


def draw_results(rows: Sequence[Row], width: float = WIDTH) -> Figure:
    """The metrics of each table side by side, a color for each model, deviations as whiskers, and below it the models.

    Args:
        rows: as of `collect`.
        width: inches.
    """
    found = [list(zip(_labels(table), table, strict=True)) for table in tables(rows)]
    heights = [HEIGHT + legend_height([label for label, _ in table], width) for table in found]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    models = list(dict.fromkeys(label for table in found for label, _ in table))
    for part, table in zip(parts, found, strict=True):
        axes, keys = part.subplots(), []
        first, names = table[0][1].record, shown_metrics([row for _, row in table])
        names = [name for name in names if name not in UNITS]  # one axis has one unit
        wide = 0.8 / len(table)
        for number, (label, row) in enumerate(table):
            index = models.index(label)  # the same color in all tables
            color, hatch = LINES[index % len(LINES)], HATCHES[index // len(LINES) % len(HATCHES)]
            places = [place + (number - (len(table) - 1) / 2) * wide for place in range(len(names))]
            values = [row.record.metrics.get(name, math.nan) for name in names]
            errors = [row.record.deviations.get(name, 0.0) for name in names] if row.record.deviations else None
            axes.bar(
                *(places, values, wide), yerr=errors, color=color, hatch=hatch, edgecolor="white", linewidth=0.4,
                error_kw={"elinewidth": 0.8, "capsize": 2, "capthick": 0.8},
            )  # fmt: skip
            keys.append(Patch(label=label, facecolor=color, hatch=hatch, edgecolor="white"))
        graph(axes, f"{first.protocol} on {first.data.name} {first.split or ''}".rstrip(), "", "percent", width)
        axes.grid(visible=False, axis="x")
        slot = 0.9 * (width - BESIDE) / len(names)
        axes.set_xticks(range(len(names)), [wrapped(name, slot, lines=4) for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
        add_legend(part, keys, width)
    return figure


def _labels(table: Sequence[Row]) -> list[str]:
    """What the models of a table are called, with the settings in which they differ."""
    differing = differing_settings(table)
    return [
        ", ".join(
            [f"{row.record.model} ({weights_of(row)})"]
            + [f"{key}={row.settings[key]}" for key in differing if key in row.settings]
        )
        for row in table
    ]
