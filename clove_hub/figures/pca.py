"""Photos above the first three principal components of their feature maps, drawn as colors.

The first is the lightness, the second goes from blue to yellow, the third from green to purple: so the first two can be
seen without telling red from green.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from clove_hub.data.images import printable
from clove_hub.weights import load_backbone

from .photos import add_model_arguments, add_photo_arguments, over_photo, read_squares, seen
from .style import SMALL, WIDTH, Image, bare, tight, wrapped

OKLAB_TO_LMS = torch.tensor(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]],
    dtype=torch.float64,
)
LMS_TO_RGB = torch.tensor(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ],
    dtype=torch.float64,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_photo_arguments(parser, photos=5, size=448)


def draw(options: argparse.Namespace) -> Figure:
    """
    Raises:
        ValueError: the model cannot be loaded, or there are no photos.
    """
    photos = read_squares(options)
    backbone = load_backbone(options.model, seed=options.seed)
    images = [image for _, image in photos]
    scores = components([seen(backbone, image, options.level) for image in images])
    return component_maps(
        [np.asarray(image) for image in images], scores, [printable(photo.stem) for photo, _ in photos]
    )


def components(maps: Sequence[Tensor]) -> list[Tensor]:
    """The first three principal components of all maps together, so that a color means the same in every photo.

    Args:
        maps: each (C, h, w).

    Returns:
        For each map (h, w, 3), between 0 and 1; the sign of a component is such that its largest weight is positive.
    """
    flat = torch.cat([one.flatten(1).T.double() for one in maps])  # (cells of all maps, C)
    centerd = flat - flat.mean(0)
    _, _, axes = torch.linalg.svd(centerd, full_matrices=False)
    axes = axes[:3]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    scores = centerd @ axes.T  # (cells, 3)
    low, high = scores.quantile(0.02, 0), scores.quantile(0.98, 0)
    parts = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).split([one[0].numel() for one in maps])
    return [part.view(*one.shape[1:], -1) for part, one in zip(parts, maps, strict=True)]


def colors_of(scores: Tensor) -> Tensor:
    """Three numbers between 0 and 1 as lightness, blue to yellow, and green to purple: (..., 3) -> sRGB (..., 3).

    By way of Oklab (Ottosson 2020), in which equal steps look equal.
    """
    lightness, yellow, purple = scores.double().unbind(-1)
    lab = torch.stack([0.35 + 0.55 * lightness, 0.24 * purple - 0.12, 0.28 * yellow - 0.14], -1)
    linear = (lab @ OKLAB_TO_LMS.T).pow(3) @ LMS_TO_RGB.T
    linear = linear.clamp(0, 1)
    return torch.where(linear > 0.0031308, 1.055 * linear.clamp(min=1e-9).pow(1 / 2.4) - 0.055, 12.92 * linear)


def component_maps(images: Sequence[Image], scores: Sequence[Tensor], titles: Sequence[str]) -> Figure:
    """Each photo above its components.

    Args:
        images: each (H, W, 3).
        scores: for each image (h, w, 3), as of `components`.
        titles: for each image.
    """
    ratios = [image.shape[1] / image.shape[0] for image in images]
    height = WIDTH / sum(ratios)
    figure = Figure(figsize=(WIDTH, 2 * height + 0.25), layout=tight())
    panels = figure.subplots(2, len(images), squeeze=False, width_ratios=ratios)
    for above, below, image, score, title in zip(*panels, images, scores, titles, strict=True):
        above.imshow(image)
        above.set_title(wrapped(title, height * image.shape[1] / image.shape[0]), fontsize=SMALL, pad=3)
        over_photo(below, colors_of(score).numpy(), image)
        bare(above)
        bare(below)
    return figure
