"""Results of several models side by side, with a panel for each table (`clove-hub results --plot`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from clove_hub.evaluation.collected import Row, differing_settings, shown_metrics, tables, weights_of
from clove_hub.evaluation.result import UNITS, Record

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
    panels = []
    for table in tables(rows):
        first = table[0].record
        title = f"{first.protocol} on {first.data.name} {first.split or ''}".rstrip()
        names = [name for name in shown_metrics(table) if name not in UNITS]  # one axis has one unit
        figures = {
            label: [_figure(row.record, name) for name in names]
            for label, row in zip(_labels(table), table, strict=True)
        }
        panels.append((title, names, figures))
    return _draw(panels, width)


def draw_summary(rows: Sequence[Row], width: float = WIDTH) -> Figure:
    """The first figure of each table in one panel, a color for each model.

    Args:
        rows: as of `collect`.
        width: inches.
    """
    names, found = [], []
    for table in tables(rows):
        first = table[0].record
        name = next(name for name in shown_metrics(table) if name not in UNITS)
        names.append(f"{first.protocol} {first.data.name} {name}")
        found.append({row.record.model: _figure(row.record, name) for row in table})
    models = dict.fromkeys(model for own in found for model in own)
    nothing = (math.nan, math.nan)
    return _draw([("", names, {model: [own.get(model, nothing) for own in found] for model in models})], width)


def _figure(record: Record, name: str) -> tuple[float, float]:
    """A metric and its deviation."""
    return record.metrics.get(name, math.nan), record.deviations.get(name) or math.nan  # no whisker of length zero


Panel = tuple[str, Sequence[str], Mapping[str, Sequence[tuple[float, float]]]]
"""Title, what stands side by side, and for each model the height and the whisker of each of these."""


def _draw(panels: Sequence[Panel], width: float) -> Figure:
    heights = [HEIGHT + legend_height(list(figures), width) for _, _, figures in panels]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    models = list(dict.fromkeys(model for _, _, figures in panels for model in figures))
    for part, (title, names, figures) in zip(parts, panels, strict=True):
        axes, keys = part.subplots(), []
        wide = 0.8 / len(figures)
        for number, (model, columns) in enumerate(figures.items()):
            index = models.index(model)  # the same color in all panels
            color, hatch = LINES[index % len(LINES)], HATCHES[index // len(LINES) % len(HATCHES)]
            places = [place + (number - (len(figures) - 1) / 2) * wide for place in range(len(names))]
            values, errors = zip(*columns, strict=True)
            axes.bar(
                *(places, values, wide), yerr=errors, color=color, hatch=hatch,
                edgecolor="white", linewidth=0.4, error_kw={"elinewidth": 0.8, "capsize": 2, "capthick": 0.8},
            )  # fmt: skip
            keys.append(Patch(label=model, facecolor=color, hatch=hatch, edgecolor="white"))
        graph(axes, title, "", "percent", width)
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
