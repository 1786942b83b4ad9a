"""The protocol `retrieve` in pictures: validation photos with their regions, the truth, and the retrieved classes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from clove_hub.data.images import read_image
from clove_hub.data.masks import VOID
from clove_hub.evaluation import retrieve as protocol
from clove_hub.evaluation.command import parse_settings
from clove_hub.evaluation.run import make_settings
from clove_hub.weights import Backbone

from .output import WIDTH
from .photos import add_protocol_arguments, read_backbones
from .sheet import Row, sheet
from .style import Image, Mask, add_legend, caption, class_colors, flat, legend_height, outlined


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
    parser.add_argument("--images", type=int, default=4, help="how many of the test split, spread evenly (default: 4)")


def draw(options: argparse.Namespace) -> Figure:
    """Retrieves as the protocol does and draws some of the images.

    Raises:
        ValueError: as `clove-hub evaluate retrieve`, or a number is not positive.
    """
    if options.images < 1:
        raise ValueError(f"--images is {options.images}; expected at least 1")
    given = parse_settings(options.settings)
    if "test_images" in given:
        raise ValueError("test_images is set by --images: leave it out")
    return draw_backbones(read_backbones(options), options.data, given, options.images, options.seed, options.width)


def draw_backbones(
    backbones: Mapping[str, Backbone],
    data: Path,
    settings: Mapping[str, Any],
    images: int = 4,
    seed: int = 0,
    width: float = WIDTH,
) -> Figure:
    """Some images, the truth, and beside it the classes that each backbone finds for its regions of them.

    Args:
        backbones: by what they are called.
        data: as for the protocol.
        settings: of the protocol, those that differ from its own.
        images: of the test split, spread evenly.
        seed: of the first centers of k-means.
        width: inches.

    Raises:
        ValueError: as the protocol.
    """
    chosen = make_settings("retrieve", {**settings, "test_images": images})
    with torch.no_grad():
        found = {name: list(retrieved(backbone, data, chosen, seed)) for name, backbone in backbones.items()}
    _, test = protocol.open_splits(data, chosen)
    return segment_strips(found, test.classes, width)


def retrieved(backbone: Backbone, data: Path, settings: protocol.Settings, seed: int) -> Iterator[Retrieved]:
    """The test images and what the protocol says of each pixel."""
    train, test = protocol.open_splits(data, settings)
    backbone, settings = protocol.prepared(backbone, settings)
    bank = protocol.remember(backbone, data, train, settings, seed)
    images, _, _ = protocol.divided(backbone, data, test, settings, seed, lambda image: image)
    for image in images:
        predicted = bank.classes_of(image.regions)[image.places]
        yield Retrieved(read_image(image.photo), image.places.numpy(), image.truth.numpy(), predicted.numpy())


def segment_strips(found: Mapping[str, Sequence[Retrieved]], classes: Sequence[str], width: float = WIDTH) -> Figure:
    """A row for each photo: the true classes, and those that each backbone retrieves for the regions outlined.

    Args:
        found: for each backbone the same images.
        classes: their names.
    """
    colors = class_colors(len(classes))
    images = list(zip(*found.values(), strict=True))
    masks = [mask for row in images for one in row for mask in (one.truth, one.predicted)]
    entries = [
        Patch(facecolor=flat(np.array([[index]]), colors)[0, 0] / 255, edgecolor="gray", linewidth=0.5, label=name)
        for index in sorted({int(index) for mask in masks for index in np.unique(mask)})
        for name in ["no class" if index == VOID else classes[index].replace("_", " ")]
    ]
    titles = ["photo", "truth", *found]
    shapes = [row[0].image.shape for row in images]
    on = sheet(
        [Row([w / h] * len(titles), titles=() if number else titles) for number, (h, w, _) in enumerate(shapes)],
        width,
        "White lines: the regions, each of which gets one class. In percent: the pixels that get the right class.",
        legend_height([str(entry.get_label()) for entry in entries], width),
    )
    for row, (photo, truth, *panels) in zip(images, on.panels, strict=True):
        photo.imshow(row[0].image)
        truth.imshow(flat(row[0].truth, colors), interpolation="nearest")
        known = row[0].truth != VOID
        for one, axes in zip(row, panels, strict=True):
            axes.imshow(flat(one.predicted, colors), interpolation="nearest")
            for number in np.unique(one.regions):
                outlined(axes, one.regions == number, "white", 0.5)
            right = 100 * (one.truth == one.predicted)[known].mean() if known.any() else 0
            caption(axes, f"{right:.0f} %")
    add_legend(on.figure, entries, on.figure.get_figwidth(), on.free)
    return on.figure
