"""What the protocol `propagate` sees: frames of a clip with their true masks, and with those carried from the first."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

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
from clove_hub.weights import load_backbone

from .photos import add_protocol_arguments
from .style import OBJECT_COLORS, SMALL, TITLE, WIDTH, Image, Mask, bare, caption, outlined, tight, tinted


class Strip(NamedTuple):
    """Some frames of a clip, the first of which is the clip's first."""

    title: str
    numbers: list[int]
    """Of the frames in the clip, from 0."""
    images: list[Image]
    truths: list[Mask]
    """Numbers of the objects from 1, each (H, W)."""
    predicted: list[Mask]
    """Likewise; the first is what was given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_protocol_arguments(parser, "clips, as for `clove-hub evaluate propagate`", "frames=30")
    parser.add_argument(
        "--clip", action="append", metavar="NAME", help="a clip to draw; may be repeated (default: the first three)"
    )
    parser.add_argument("--shown", type=int, default=5, help="frames of each clip that are drawn (default: 5)")


def draw(options: argparse.Namespace) -> Figure:
    """Propagates as the protocol does and draws some of the frames.

    Raises:
        ValueError: as `clove-hub evaluate propagate`; no clip has the name asked for, or too few frames are asked for.
    """
    if options.shown < 2:
        raise ValueError(f"--shown is {options.shown}; expected at least 2, of which the first is given")
    settings = make_settings("propagate", parse_settings(options.settings))
    clips = chosen_clips(find_clips(options.data, settings.frames), options.clip)
    backbone, settings = protocol.prepared(load_backbone(options.model, seed=options.seed), settings)
    with torch.no_grad():
        return propagation_strips(
            [strip(clip, *protocol.follow(backbone, clip, settings), options.shown) for clip in clips]
        )


def chosen_clips(clips: Sequence[Clip], names: Sequence[str] | None) -> list[Clip]:
    """Those of the names, or the first three."""
    if names is None:
        return list(clips[:3])
    known = {clip.name: clip for clip in clips}
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"there is no clip {wrong[0]!r}; the list names {', '.join(known)}")
    return [known[name] for name in names]


def strip(clip: Clip, truths: list[torch.Tensor], predicted: list[torch.Tensor], shown: int) -> Strip:
    """Some of the frames, spread evenly from the first to the last, with the clip's J and F in the title."""
    region, contour = 100 * protocol.score(truths, predicted)[:, :, 0].mean(0)
    numbers = spread(range(len(clip.frames)), shown)
    return Strip(
        title=f"{clip.name}: J&F {(region + contour) / 2:.1f} (J {region:.1f}, F {contour:.1f})",
        numbers=numbers,
        images=[read_image(clip.frames[number]) for number in numbers],
        truths=[truths[number].numpy() for number in numbers],
        predicted=[predicted[number].numpy() for number in numbers],
    )


def propagation_strips(strips: Sequence[Strip]) -> Figure:
    """For each clip a row of frames with their true masks above one with those propagated, and the mean J of each."""
    count = max(len(one.images) for one in strips)
    wide = (WIDTH - 0.2) / count
    heights = [2 * wide * one.images[0].shape[0] / one.images[0].shape[1] + 0.32 for one in strips]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout=tight(0.015))
    parts = figure.subfigures(len(strips), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, one in zip(parts, strips, strict=True):
        part.suptitle(one.title, fontsize=TITLE, fontweight="bold")
        panels = part.subplots(2, count, squeeze=False)
        for axes in panels.flat:
            bare(axes)
        for axes, name in zip(panels[:, 0], ("truth", "propagated"), strict=True):
            axes.set_ylabel(name, fontsize=SMALL)
        for (above, below), number, image, truth, predicted in zip(
            panels.T, one.numbers, one.images, one.truths, one.predicted, strict=False
        ):
            above.set_title(f"frame {number}", fontsize=SMALL, pad=2)
            paint(above, image, truth)
            paint(below, image, predicted)
            caption(below, "given" if number == 0 else f"J {100 * mean_region_similarity(predicted, truth, one):.0f}")
    return figure


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
