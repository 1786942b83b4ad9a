"""The scores of each class as a table, and the confusion matrix as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.ops import box_iou

from clove_hub.figures.output import save

BACKGROUND = "background"
OVERLAP = 0.5
"""IoU from which on a box is where another is."""
WRITTEN = 25
"""Classes up to which the squares of a confusion picture have their shares written in."""
NAMED = 100
"""Classes up to which they have their names beside them."""


def matched(found: Mapping[str, Tensor], truth: Mapping[str, Tensor], classes: int, threshold: float) -> Tensor:
    """The confusion matrix of the objects of an image: int64 (K + 1, K + 1).

    Pairs of a true and a found box are formed by their overlap, the greatest first, whatever their classes are.

    Args:
        found: boxes (N, 4), labels (N,) from 1, scores (N,).
        truth: boxes (M, 4), labels (M,).
        classes: K, without the background.
        threshold: detections with a lower score do not count.

    Returns:
        True classes in rows, predicted ones in columns. The last row counts false detections, the last column missed
        objects.
    """
    kept = found["scores"].cpu() >= threshold
    boxes, labels = found["boxes"].cpu()[kept], found["labels"].cpu()[kept] - 1
    there, names = truth["boxes"].cpu(), truth["labels"].cpu() - 1
    matrix = torch.zeros(classes + 1, classes + 1, dtype=torch.int64)
    missed, wrong = set(range(len(there))), set(range(len(boxes)))
    overlaps = box_iou(there, boxes)
    rows, columns = (overlaps >= OVERLAP).nonzero(as_tuple=True)
    for pair in overlaps[rows, columns].argsort(descending=True, stable=True).tolist():
        one, other = int(rows[pair]), int(columns[pair])
        if one in missed and other in wrong:
            missed.remove(one)
            wrong.remove(other)
            matrix[names[one], labels[other]] += 1
    for one in missed:
        matrix[names[one], classes] += 1
    for other in wrong:
        matrix[classes, labels[other]] += 1
    return matrix


def rows_of(items: Mapping[str, Mapping[str, float]], counts: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    """A heading, and a row for each class: its name, how much of it the test images have, its figures.

    Args:
        items: the figures of each class, in percent.
        counts: of each class, `instances` and `images`, or `pixels`.
    """
    figures = list(dict.fromkeys(name for each in items.values() for name in each if name != "pixels"))
    sums = list(dict.fromkeys(name for each in counts.values() for name in each))
    rows = [["class", *sums, *figures]]
    for name, own in counts.items():
        scored = items.get(name, {})
        shown = [f"{scored[figure]:.1f}" if figure in scored else "-" for figure in figures]
        rows.append([name, *(str(own[key]) for key in sums), *shown])
    return rows


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """In columns, for the screen."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def as_csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def draw_confusion(matrix: Tensor, names: Sequence[str], path: Path) -> None:
    """A picture of a confusion matrix (K, K), each row of it as shares of the true class.

    Args:
        names: of the K classes.
        path: ends in .png.
    """
    counts = matrix.double().numpy()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(max(3.5, 0.3 * len(names)), 16.0)
    figure = Figure(figsize=(side + 1.5, side + 1), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, fraction=0.04, label="share of the true class")
    axes.set_xlabel("found")
    axes.set_ylabel("true")
    if len(names) <= NAMED:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    if len(names) <= WRITTEN:
        for row, column in zip(*shares.nonzero(), strict=True):
            share = shares[row, column]
            color = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=6, color=color)
    save(figure, path, dpi=150)
