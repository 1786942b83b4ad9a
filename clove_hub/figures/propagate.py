"""The protocol `propagate` in pictures: frames of a clip with their true masks and with the propagated ones."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clove_hub.data.clips import Clip, find_clips
from clove_hub.data.files import spread
from clove_hub.data.images import read_image
from clove_hub.evaluation import propagate as protocol
from clove_hub.evaluation.command import parse_settings
from clove_hub.evaluation.run import make_settings
from clove_hub.evaluation.scores import region_similarity
from clove_hub.weights import Backbone

from .output import WIDTH
from .photos import add_protocol_arguments, read_backbones
from .sheet import Row, sheet
from .style import OBJECT_COLORS, Image, Mask, caption, outlined, tinted


class Carried(NamedTuple):
    """The masks that one backbone carries through a clip."""

    heading: str
    predicted: list[Mask]
    """Numbers of the objects from 1, each (H, W); the first is what was given."""


class Strip(NamedTuple):
    """Some frames of a clip, the first of which is the clip's first."""

    name: str
    numbers: list[int]
    """Of the frames in the clip, from 0."""
    images: list[Image]
    truths: list[Mask]
    """As `Carried.predicted`."""
    carried: list[Carried]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_protocol_arguments(parser, "clips, as for `clove-hub evaluate propagate`", "frames=30")
    parser.add_argument(
        "--clip",
        action="append",
        metavar="NAME",
        help="a clip to draw; may be given several times (default: the first three)",
    )
    parser.add_argument("--shown", type=int, default=5, help="frames to draw of each clip (default: 5)")


def draw(options: argparse.Namespace) -> Figure:
    """Propagates as the protocol does and draws some of the frames.

    Raises:
        ValueError: as `clove-hub evaluate propagate`; no clip has the name asked for, or too few frames are asked for.
    """
    if options.shown < 2:
        raise ValueError(f"--shown is {options.shown}; expected at least 2, of which the first is given")
    given = parse_settings(options.settings)
    return draw_backbones(read_backbones(options), options.data, given, options.clip, options.shown, options.width)


def draw_backbones(
    backbones: Mapping[str, Backbone],
    data: Path,
    settings: Mapping[str, Any],
    clips: Sequence[str] | None = None,
    shown: int = 5,
    width: float = WIDTH,
) -> Figure:
    """Frames of some clips with their true masks, and with those that each backbone carries from the first.

    Args:
        backbones: by what they are called.
        data: as for the protocol.
        settings: of the protocol, those that differ from its own.
        clips: their names; the first three if not given.
        shown: frames of each.
        width: inches.

    Raises:
        ValueError: as the protocol, or no clip has the name asked for.
    """
    chosen = make_settings("propagate", settings)
    found = chosen_clips(find_clips(data, chosen.frames), clips)
    with torch.no_grad():
        ready = {name: protocol.prepared(backbone, chosen) for name, backbone in backbones.items()}
        return propagation_strips([strip(ready, clip, shown) for clip in found], width)


def chosen_clips(clips: Sequence[Clip], names: Sequence[str] | None) -> list[Clip]:
    """Those of the names, or the first three."""
    if names is None:
        return list(clips[:3])
    known = {clip.name: clip for clip in clips}
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"there is no clip {wrong[0]!r}; the list has {', '.join(known)}")
    return [known[name] for name in names]


def strip(ready: Mapping[str, tuple[Backbone, protocol.Settings]], clip: Clip, shown: int) -> Strip:
    """Some of the frames, spread evenly from the first to the last, with the clip's J and F by each backbone.

    Args:
        ready: as `protocol.prepared` gives them.
    """
    numbers = spread(range(len(clip.frames)), shown)
    carried = []
    for name, (backbone, settings) in ready.items():
        truths, predicted = protocol.follow(backbone, clip, settings)
        region, contour = 100 * protocol.score(truths, predicted)[:, :, 0].mean(0)
        heading = f"{name}: J&F {(region + contour) / 2:.1f} % (J {region:.1f}, F {contour:.1f})"
        carried.append(Carried(heading, [predicted[number].numpy() for number in numbers]))
    images = [read_image(clip.frames[number]) for number in numbers]
    return Strip(clip.name, numbers, images, [truths[number].numpy() for number in numbers], carried)


def propagation_strips(strips: Sequence[Strip], width: float = WIDTH) -> Figure:
    """For each clip a row of frames with their true masks above one for each backbone, with the mean J of each frame."""
    rows, content = [], []
    for one in strips:
        ratios = [image.shape[1] / image.shape[0] for image in one.images]
        rows.append(Row(ratios, f"{one.name}: truth", [f"frame {number}" for number in one.numbers]))
        content.append((one, one.truths))
        for carried in one.carried:
            rows.append(Row(ratios, carried.heading))
            content.append((one, carried.predicted))
    on = sheet(rows, width, "In each frame: the mean over its objects of J, the overlap with the truth, in percent.")
    for (one, masks), panels in zip(content, on.panels, strict=True):
        for axes, number, image, truth, mask in zip(panels, one.numbers, one.images, one.truths, masks, strict=True):
            paint(axes, image, mask)
            if masks is not one.truths:
                caption(axes, "given" if number == 0 else f"J {100 * mean_region_similarity(mask, truth, one):.0f}")
    return on.figure


def paint(axes: Axes, image: Image, mask: Mask) -> None:
    """A frame with its objects tinted and outlined."""
    axes.imshow(tinted(image, mask, OBJECT_COLORS))
    for number in np.unique(mask[mask > 0]):
        outlined(axes, mask == number, "white", 0.6)


def mean_region_similarity(predicted: Mask, truth: Mask, one: Strip) -> float:
    """The mean J over the objects of the clip's first frame."""
    numbers = range(1, int(one.truths[0].max()) + 1)
    found, true = torch.from_numpy(predicted), torch.from_numpy(truth)
    return float(np.mean([region_similarity(found == number, true == number) for number in numbers]))
