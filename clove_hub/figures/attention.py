"""What each attention head attends to from chosen points of a photo.

For a CLoVE run, these are the heads of its predictor, which select the context of a cell (section 3.2); for any other
vision transformer, those of its last block.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from timm.layers.attention import Attention
from torch import Tensor, nn

from clove_hub.backbones import feature_map

from ..weights import SOURCE, Backbone, MethodState, load_backbone, load_method
from ..weights.backbone import finite
from ..weights.source import find_source
from .output import WIDTH
from .photos import (
    SIZE,
    Photo,
    Point,
    add_photo_arguments,
    cell_of,
    cells_note,
    mark,
    middle_of,
    over_photo,
    read_photos,
    read_point,
    seen,
)
from .sheet import SCALE, Row, add_scale, sheet
from .style import Image

POINTS = [(0.25, 0.5), (0.5, 0.5), (0.75, 0.5)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="SOURCE", help=f"a run of clove, or a vision transformer: {SOURCE}")
    parser.add_argument(
        "--points",
        nargs="+",
        type=read_point,
        default=POINTS,
        metavar="X,Y",
        help="points as fractions of each photo (default: three across its middle)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of random: weights (default: 0)")
    add_photo_arguments(parser, photos=1, size=SIZE)


def draw(options: argparse.Namespace) -> Figure:
    """The attention of a run's heads, or of a vision transformer's last block.

    Raises:
        ValueError: it is neither a run of clove nor a vision transformer, or there are no photos.
    """
    attend = load_attention(options.model, options.seed)
    photos = read_photos(options)
    maps = [attend(photo, options.size) for photo in photos]
    images = [photo.shown(options.size) for photo in photos]
    return attention_maps(images, maps, options.points, options.size, options.width)


def load_attention(source: str, seed: int = 0) -> Callable[[Photo, int], Tensor]:
    """What gives the attention of a source for a photo at a size in pixels, as `predictor_attention` does.

    Raises:
        ValueError: it is neither a run of clove nor a vision transformer.
    """
    if find_source(source).kind in ("run", "checkpoint") and (learned := load_method(source)).name == "clove":
        return partial(predictor_attention, learned)
    backbone = load_backbone(source, seed=seed)
    if not isinstance(last_attention(backbone), Attention):
        raise ValueError(
            f"{source} has no attention heads: give a run of clove, or a vision transformer such as "
            "random:vit_tiny_patch16_224"
        )
    return partial(block_attention, backbone)


def predictor_attention(learned: MethodState, photo: Photo, size: int) -> Tensor:
    """What each cell attends to, for each head: (heads, h, w, h, w); from (h, w) to (h, w).

    Args:
        learned: of clove.
        size: pixels a side of what the student sees; the nearest that has whole cells is taken.
    """
    student = learned.method.student
    backbone = Backbone(student["backbone"], learned.preprocessing, learned.what)
    with torch.no_grad():
        cells = student["projector"](feature_map(backbone.model, photo.pixels(backbone, size)))
        height, width = cells.shape[2:]
        weights: Tensor = student["predictor"].weights(cells.flatten(2).transpose(1, 2))[0]  # (heads, N, N)
    return finite(weights, learned.what).view(-1, height, width, height, width)


def block_attention(backbone: Backbone, photo: Photo, size: int) -> Tensor:
    """The same of the last block of a vision transformer; what goes to class token and registers is left out."""
    attention, came = last_attention(backbone), []
    watch = attention.register_forward_pre_hook(lambda _, given: came.append(given[0]))
    try:
        height, width = seen(backbone, photo, -1, size).shape[1:]
    finally:
        watch.remove()
    with torch.no_grad():
        query, key, _ = attention.qkv(came[0]).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        similar: Tensor = (
            attention.scale * attention.q_norm(query) @ attention.k_norm(key).transpose(2, 3)
        )  # (1, heads, N, N)
    first = similar.shape[2] - height * width  # behind the class token and the registers
    return similar.float().softmax(3)[0, :, first:, first:].cpu().view(-1, height, width, height, width)


def last_attention(backbone: Backbone) -> Any:
    """That of the last block; None of a network without."""
    blocks = getattr(backbone.model, "blocks", None)
    return getattr(blocks[-1], "attn", None) if isinstance(blocks, nn.Sequential) else None


def attention_maps(
    images: Sequence[Image], maps: Sequence[Tensor], points: Sequence[Point], size: int, width: float = WIDTH
) -> Figure:
    """A row for each point of each photo: the photo with the point, and a panel for each head.

    Brightness is the weight as a multiple of what even attention would give each cell.

    Args:
        images: each (H, W, 3).
        maps: for each image (heads, h, w, h, w), as of `predictor_attention`.
        size: pixels a side of what the network saw.
    """
    rows = [(image, weights, point) for image, weights in zip(images, maps, strict=True) for point in points]
    heads = maps[0].shape[0]
    titles = ["photo", *(f"head {number}" for number in range(1, heads + 1))]
    on = sheet(
        [
            Row([image.shape[1] / image.shape[0]] * (heads + 1), titles=() if number else titles)
            for number, (image, _, _) in enumerate(rows)
        ],
        width,
        cells_note(size),
        SCALE,
    )
    shares = []
    for _, weights, point in rows:
        row, column = cell_of(point, *weights.shape[1:3])
        shares.append(weights[:, row, column] * weights[0, 0, 0].numel())  # (heads, h, w), 1 where attention is even
    brightest = max(float(share.quantile(0.99)) for share in shares)
    for (image, _, point), share, own in zip(rows, shares, on.panels, strict=True):
        own[0].imshow(image)
        mark(own[0], point, image)
        for axes, head in zip(own[1:], share, strict=True):
            over_photo(axes, head.numpy(), image, cmap="viridis", vmin=0, vmax=brightest)
            mark(axes, middle_of(cell_of(point, *head.shape), *head.shape), image)
    add_scale(on, on.panels[0][1].images[0], "attention, as a multiple of an even share", "max")
    return on.figure
