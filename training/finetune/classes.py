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
"""Minimum IoU of two matching boxes."""
WRITTEN = 25
"""Maximum number of classes for which a confusion picture has its values written in the cells."""
NAMED = 100
"""Maximum number of classes for which it has their names."""


def matched(found: Mapping[str, Tensor], truth: Mapping[str, Tensor], classes: int, threshold: float) -> Tensor:
    """The confusion matrix of the objects of an image: int64 (K + 1, K + 1).

    True and detected boxes are paired by overlap, the greatest first, regardless of class.

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
    """A header, and a row for each class: its name, its frequency in the test images, its figures.

    Args:
        items: the figures of each class, in percent.
        counts: for each class, `instances` and `images`, or `pixels`.
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
    """Format rows in columns for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def as_csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def draw_confusion(matrix: Tensor, names: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix (K, K), with each row as fractions of the true class.

    Args:
        names: names of the K classes.
        path: a file name that ends in .png.
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
