"""Figures as they come out, and runs to draw them from."""

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text

from clove_hub.backbones import create_backbone
from clove_hub.figures.command import add_arguments
from clove_hub.methods import METHODS
from clove_hub.runs import STATE
from clove_hub.training.run.checkpoints import write

DPI = 100
CLOVE = [  # rows of metrics.jsonl
    {
        "step": step,
        "loss": 100 - step,
        "gradient_norm": 2.0,
        "learning_rate": 0.1 * step,
        "positive_cosine": 0.1 * step,
        "negative_cosine": 0.05 * step,
        "matched_cells": 0.8,
        "embedding_spread": 0.9,
        "images_per_second": 5.0,
    }
    for step in (1, 2, 3)
]
EVALUATIONS = [  # of evaluations.jsonl
    {
        "step": step,
        "asked": {"protocol": "correspond", "data": "some/photos"},
        "record": {"metrics": {"correspond": 20.0 + step, "chance": 8.0}},
    }
    for step in (0, 3)
]


def rendered(figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3]


def color_at(pixels: np.ndarray, axes, column: float, row: float) -> np.ndarray:
    """The color of the rendered figure where a panel shows a pixel of its image."""
    x, y = axes.transData.transform((column, row))
    return pixels[pixels.shape[0] - 1 - int(y), int(x)].astype(int)


def close(found, expected, tolerance: int = 3) -> bool:
    return bool(np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int)).max() <= tolerance)


def words(figure) -> list[Text]:
    """All that is written; matplotlib keeps labels of ticks beyond the ends of an axis too, which are not drawn."""
    beyond = {
        label
        for axes in figure.axes
        for axis, ends in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim())))
        for tick in axis.get_major_ticks()
        if not ends[0] <= tick.get_loc() <= ends[1]
        for label in (tick.label1, tick.label2)
    }
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible() and text not in beyond]


def assert_readable(figure) -> None:
    """At least seven points, inside the figure, none upon another, upon a line or in a legend that covers a panel."""
    pixels = rendered(figure)
    height, width, _ = pixels.shape
    boxes = {}
    for text in words(figure):
        box = text.get_window_extent()
        assert text.get_fontsize() >= 7, text
        assert -0.5 <= box.x0 < box.x1 <= width + 0.5, text
        assert -0.5 <= box.y0 < box.y1 <= height + 0.5, text
        boxes[text] = box
    for (one, a), (other, b) in combinations(boxes.items(), 2):
        assert not overlapping(a, b), (one, other)
    for line in figure.findobj(Line2D):
        path = line.get_transform().transform_path(line.get_path())
        if len(path.vertices) > 1 and line.get_linestyle() != "None" and line in getattr(line.axes, "lines", ()):
            for text, box in boxes.items():
                assert not path.intersects_bbox(box, filled=False), (text, line)
    for legend in figure.findobj(Legend):
        for axes in figure.axes:
            assert not overlapping(legend.get_window_extent(), axes.get_window_extent()), legend
    frame = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    assert min(int(side.min()) for side in frame) == 255, "something is cut off at the edge"


def overlapping(a, b) -> bool:
    return a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1


def arguments(module, *given: object) -> argparse.Namespace:
    """What `clove-hub figures` makes of the words for one kind."""
    parser = argparse.ArgumentParser()
    add_arguments(module.__name__.rpartition(".")[2], parser)
    return parser.parse_intermixed_args([*(str(word) for word in given), "--out", "x.png"])


def save_run(run: Path, name: str, settings: dict, backbone: str = "test_resnet", args: dict | None = None) -> Path:
    entry = METHODS[name]
    torch.manual_seed(0)
    method = entry.build(create_backbone(backbone, args=args), entry.settings(**settings))
    state = {
        "steps_total": 10,
        "epoch": 1,
        "finished": True,
        "images_seen": 80,
        "method": name,
        "exported": method.exported,
        "backbone": backbone,
        "preprocessing": {"size": 64, "mean": [0.5] * 3, "std": [0.25] * 3},
        "data": {"name": "photos", "fingerprint": "0" * 64, "images": 8},
        "hardware": "1 x CPU",
        "versions": {},
        "recipe": {
            "method": {"name": name, "global_scale": [0.1, 1.0]} | settings,
            "backbone": {"model": backbone, "args": args or {}},
        },
        "grad_scaler": None,
    }
    assert {"step", "files", *state} == set(STATE)
    write(run / "checkpoints" / "step_00000010", 10, {"model": method.state_dict(), "optimizer": {}}, state)
    return run
