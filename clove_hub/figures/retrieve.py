"""What the protocol `retrieve` sees: validation photos with their regions, the truth, and the classes retrieved."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from clove_hub.data.images import read_image
from clove_hub.data.masks import VOID
from clove_hub.evaluation import retrieve as protocol
from clove_hub.evaluation.command import parse_settings
from clove_hub.evaluation.run import make_settings
from clove_hub.weights import Backbone, load_backbone

from .photos import add_protocol_arguments
from .style import SMALL, TITLE, WIDTH, Image, Mask, bare, caption, class_colors, flat, outlined, tight


class Retrieved(NamedTuple):
    """One row of the picture."""

    image: Image
    regions: Mask
    """The region of each pixel, (H, W)."""
    truth: Mask
    """The class of each pixel, 255 where there is none."""
    predicted: Mask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_protocol_arguments(parser, "images and masks, as for `clove-hub evaluate retrieve`", "regions=9")
    parser.add_argument("--images", type=int, default=4, help="of the test split, spread evenly (default: 4)")


def draw(options: argparse.Namespace) -> Figure:
    """Retrieves as the protocol does and draws some of the images.

    Raises:
        ValueError: as `clove-hub evaluate retrieve`, or a number is not positive.
    """
    if options.images < 1:
        raise ValueError(f"--images is {options.images}; expected at least 1")
    given = parse_settings(options.settings)
    if "test_images" in given:
        raise ValueError("test_images is what --images says: leave it out")
    settings = make_settings("retrieve", given | {"test_images": options.images})
    backbone = load_backbone(options.model, seed=options.seed)
    with torch.no_grad():
        rows = list(retrieved(backbone, options.data, settings, options.seed))
    _, test = protocol.open_splits(options.data, settings)
    return segment_strips(rows, test.classes)


def retrieved(backbone: Backbone, data: Path, settings: protocol.Settings, seed: int) -> Iterator[Retrieved]:
    """The test images and what the protocol says of each pixel."""
    train, test = protocol.open_splits(data, settings)
    backbone, settings = protocol.prepared(backbone, settings)
    bank = protocol.remember(backbone, data, train, settings, seed)
    images, _, _ = protocol.divided(backbone, data, test, settings, seed, lambda image: image)
    for image in images:
        predicted = bank.classes_of(image.regions)[image.places]
        yield Retrieved(read_image(image.photo), image.places.numpy(), image.truth.numpy(), predicted.numpy())


def segment_strips(rows: Sequence[Retrieved], classes: Sequence[str]) -> Figure:
    """A row for each photo: its regions outlined, the true classes, and those retrieved with their pixel accuracy."""
    colors = class_colors(len(classes))
    present = sorted({int(index) for row in rows for mask in (row.truth, row.predicted) for index in np.unique(mask)})
    columns = 4
    legend_height = 0.1 + 0.16 * -(-len(present) // columns)
    height = sum(row.image.shape[0] / row.image.shape[1] for row in rows) * WIDTH / 3 + 0.25
    figure = Figure(
        figsize=(WIDTH, height + legend_height),
        layout=tight(space=0.01),
    )
    panels = figure.subplots(
        len(rows), 3, squeeze=False, height_ratios=[row.image.shape[0] / row.image.shape[1] for row in rows]
    )
    for axes, title in zip(panels[0], ("photo and its regions", "truth", "retrieved"), strict=True):
        axes.set_title(title, fontsize=TITLE)
    for row, (photo, truth, predicted) in zip(rows, panels, strict=True):
        photo.imshow(row.image)
        for number in np.unique(row.regions):
            outlined(photo, row.regions == number, "white", 0.5)
        truth.imshow(flat(row.truth, colors), interpolation="nearest")
        predicted.imshow(flat(row.predicted, colors), interpolation="nearest")
        known = row.truth != VOID
        right = 100 * (row.truth == row.predicted)[known].mean() if known.any() else 0
        caption(predicted, f"{right:.0f} % right")
    for axes in panels.flat:
        bare(axes)
    entries = [
        Patch(facecolor=flat(np.array([[index]]), colors)[0, 0] / 255, edgecolor="gray", linewidth=0.5, label=name)
        for index, name in ((i, "no class" if i == VOID else classes[i].replace("_", " ")) for i in present)
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=columns, fontsize=SMALL, frameon=False)
    return figure
