"""Training curves: the loss, the cosines, the signs of collapse and the evaluations during training.

Everything that a method logs is drawn. For runs with hundreds of rows, bold lines are running means.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from clove_hub.command import user_path
from clove_hub.runs import read_rows

from .output import WIDTH
from .style import LINES, STYLES, LineStyle, add_key, add_legend, graph, legend_height

COLUMNS, NARROW, HEIGHT = 3, 1.7, 1.9
"""At most so many panels beside each other, and the inches that each is wide at least, and high."""
SMOOTH = 100
"""A running mean spans this part of a run: 1 / SMOOTH."""
SPREAD, COLLAPSED = "embedding_spread", 0.1
"""What tells a collapse, and below which value the run's log warns of one."""
UNDRAWN = (
    *("step", "epoch", "images_per_second", "waiting_for_data", "host_memory_gb", "device_memory_gb", "broken_images"),
    "teacher_momentum",
)


class Panel(NamedTuple):
    """Quantities that share axes."""

    title: str
    unit: str
    series: Mapping[str, str]
    """Keys of a row, and what they are called."""
    limits: tuple[float | None, float | None] = (None, None)


KNOWN = (
    Panel(
        "loss",
        "loss",
        {"loss": "loss", "contrast": "contrast", "neighbor_contrast": "neighbor contrast"}
        | {"group_loss": "grouping", "slot_loss": "slots"},
    ),
    Panel("cosine to the teacher", "cosine", {"positive_cosine": "positives", "negative_cosine": "hard negatives"}),
    Panel(
        "cosine of cells",
        "cosine",
        {"dense_positive_cosine": "positives", "dense_negative_cosine": "negatives"},
    ),
    Panel("spread of the teacher", "distance to the mean", {SPREAD: "spread"}, (0, 1.05)),
    Panel("cells with a match", "fraction", {"matched_cells": "matched"}, (0, 1.05)),
    Panel("prototypes in use", "fraction", {"used_prototypes": "used"}, (0, None)),
    Panel("slots", "slots in a crop", {"active_slots": "active", "contrasted_slots": "in both crops"}, (0, None)),
    Panel("gradient", "norm", {"gradient_norm": "norm"}, (0, None)),
    Panel("learning rate", "rate", {"learning_rate": "rate"}, (0, None)),
)


Series = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps and values."""


class Run(NamedTuple):
    """What a run has written."""

    metrics: Sequence[Mapping[str, Any]]
    """The rows of metrics.jsonl, each with a `step`."""
    evaluations: Sequence[Mapping[str, Any]] = ()
    """The rows of evaluations.jsonl: `step`, what was `asked` for, and the `record`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--labels", nargs="+", metavar="LABEL", help="labels of the runs (default: the names of the folders)"
    )


def draw(options: argparse.Namespace) -> Figure:
    """Reads the runs and draws them.

    Raises:
        ValueError: a folder is no run or has no rows yet; there are not as many labels as runs.
    """
    labels = options.labels or [path.resolve().name for path in options.runs]
    if not options.labels and len(set(labels)) < len(labels):
        labels = [str(path) for path in options.runs]
    if len(labels) != len(options.runs) or len(set(labels)) < len(labels):
        raise ValueError(
            f"--labels {' '.join(labels)}: expected {len(options.runs)} different labels, one for each run"
        )
    if len(labels) > len(LINES):
        raise ValueError(f"{len(labels)} runs are too many for one picture: give at most {len(LINES)}")
    return curves({label: read_run(path) for label, path in zip(labels, options.runs, strict=True)}, options.width)


def read_run(run: Path) -> Run:
    """What a run has logged.

    Raises:
        ValueError: the folder has no metrics.jsonl, or that no rows.
    """
    if not (run / "metrics.jsonl").is_file():
        raise ValueError(f"{run} has no metrics.jsonl: give the folder of a run")
    metrics = read_rows(run / "metrics.jsonl")
    if not metrics:
        raise ValueError(f"{run / 'metrics.jsonl'} has no rows yet: wait for the run's first steps")
    return Run(metrics, read_rows(run / "evaluations.jsonl"))


# ---- the picture -----------------------------------------------------------------------------------------------------


def curves(runs: Mapping[str, Run], width: float = WIDTH) -> Figure:
    """A panel for each quantity that some run has logged, over the steps; a color for each of several runs.

    Args:
        runs: by their labels.
        width: inches.
    """
    tables = {label: table(run) for label, run in runs.items()}
    panels = chosen_panels([key for own in tables.values() for key in own])
    columns = min(len(panels), COLUMNS, int(width / NARROW))
    rows = math.ceil(len(panels) / columns)
    handles = [Line2D([], [], color=color, label=label) for color, label in zip(LINES, runs, strict=False)]
    several = len(runs) > 1
    below = legend_height(list(runs), width) if several else 0
    figure = Figure(figsize=(width, HEIGHT * rows + below), layout=ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.06))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    steps = np.concatenate([steps for own in tables.values() for steps, _ in own.values()])
    margin = max(0.03 * float(np.ptp(steps)), 0.5)
    for axes, panel in zip(grid, panels, strict=False):
        fill(axes, panel, tables, width / columns)
        axes.set_xlim(steps.min() - margin, steps.max() + margin)  # the same steps below each other
    for axes in grid[len(panels) :]:
        axes.remove()
    if several:
        add_legend(figure, handles, width)
    return figure


def table(run: Run) -> dict[str, Series]:
    """For each quantity its values and the steps at which it was logged.

    An evaluation's metric is called `evaluate/protocol on data/metric`.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for row in run.metrics:
        for key, value in row.items():
            if key not in UNDRAWN:
                points.setdefault(key, []).append((row["step"], value))
    for row in run.evaluations:
        label = f"{row['asked']['protocol']} on {Path(row['asked']['data']).name}"
        for name, value in row["record"]["metrics"].items():
            points.setdefault(f"evaluate/{label}/{name}", []).append((row["step"], value))
    return {key: (np.array(own, float)[:, 0], np.array(own, float)[:, 1]) for key, own in points.items()}


def chosen_panels(keys: Sequence[str]) -> list[Panel]:
    """The known panels without what is not logged, then the evaluations, then a panel for each of what is left."""
    left = dict.fromkeys(keys)
    chosen = []
    for panel in KNOWN:
        if own := {key: name for key, name in panel.series.items() if key in left}:
            chosen.append(panel._replace(series=own))
            left = {key: None for key in left if key not in own}
    evaluated: dict[str, dict[str, str]] = {}
    for key in [key for key in left if key.startswith("evaluate/")]:
        label, _, name = key.removeprefix("evaluate/").rpartition("/")
        evaluated.setdefault(label, {})[key] = name
        del left[key]
    chosen += [Panel(label, "percent", own) for label, own in evaluated.items()]
    return chosen + [Panel(key.replace("_", " "), key.replace("_", " "), {key: key}) for key in left]


def fill(axes: Axes, panel: Panel, tables: Mapping[str, Mapping[str, Series]], width: float) -> None:
    """The lines of one panel, `width` inches: with several runs the color says which, otherwise the quantity."""
    several = len(tables) > 1
    for number, own in enumerate(tables.values()):
        for place, key in enumerate(panel.series):
            if key in own:
                color = LINES[number if several else place]
                evaluated = key.startswith("evaluate/")
                line(axes, own[key], color, STYLES[place % len(STYLES)], evaluated)
                steps, values = own[key]
                if evaluated and place == 0 and len(steps) > 1 and steps[0] == 0:  # what the run began with
                    axes.axhline(values[0], color=color, linewidth=0.8, linestyle=":", zorder=1)
    graph(axes, panel.title, "step", panel.unit, width)
    axes.set_ylim(*panel.limits)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    entries: list[Artist] = []
    if SPREAD in panel.series:
        entries = [axes.axhspan(0, COLLAPSED, color="0.85", zorder=0, label="collapsed")]
    if len(panel.series) > 1:
        entries = [
            Line2D([], [], linestyle=STYLES[i % len(STYLES)], color="black" if several else LINES[i], label=name)
            for i, name in enumerate(panel.series.values())
        ]
    if entries:
        add_key(axes, entries, width)


def line(axes: Axes, series: Series, color: str, style: LineStyle, dots: bool) -> None:
    """One quantity; a bold running mean over a pale line where there are many values."""
    steps, values = series
    window = len(values) // SMOOTH
    if window > 1:
        axes.plot(steps, values, color=color, linewidth=0.5, alpha=0.35)
        # Each mean stands in the middle of its window.
        middle = slice((window - 1) // 2, (window - 1) // 2 + len(values) - window + 1)
        steps, values = steps[middle], np.convolve(values, np.full(window, 1 / window), mode="valid")
    alone = dots or len(values) == 1
    axes.plot(steps, values, color=color, linestyle=style, linewidth=1.2, marker="o" if alone else None, markersize=3)
