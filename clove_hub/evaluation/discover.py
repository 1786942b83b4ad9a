"""One box per image around the object that the features separate from the rest: CorLoc on VOC, without training.

There are two rules: LOST (Simeoni et al., BMVC 2021), which grows the box from the cell similar to the fewest others;
and TokenCut (Wang et al., CVPR 2022), which splits the cells in two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from clove_hub.data.coco import read_split
from clove_hub.data.files import described, spread
from clove_hub.data.voc import Boxed, has_boxes, read_boxes

from ..weights.backbone import Backbone, with_stride_one
from .kept import features_key, own_folder
from .reading import each_readable, normalized
from .result import Outcome

VERSION = 2
RULE = "lost"
RANDOMNESS = ""
PREPROCESSING = ("mean", "std")

TAU, FAINT = 0.2, 1e-5
"""Of TokenCut: the cosine above which two cells are joined, and the weight of those that are not."""
ROWS = 1024
"""Cells that are compared with all others at once."""

Box = tuple[float, float, float, float]
Grid = tuple[int, int]


@dataclass(frozen=True)
class Settings:
    rule: Literal["lost", "tokencut"] = "lost"
    """How the box is found."""
    patches: int = 100
    """For lost: how many of the cells with the fewest similar cells may vote for the object."""
    level: int | None = None
    """Feature level: -1 is the last; null for the keys of a vision transformer's last attention, or for the map that
    enters the pooling of another model."""
    split: str | None = None
    """Name of the list of images; null for trainval of VOC, and for train of COCO's format."""
    images: int | None = None
    """At most this many, spread evenly over the list; null for all."""

    def __post_init__(self) -> None:
        if self.patches < 1 or (self.images is not None and self.images < 1):
            raise ValueError(f"{self}: patches and images must be positive")


def evaluate(backbone: Backbone, data: Path, settings: Settings, seed: int) -> Outcome:
    """`CorLoc`: percent of the images whose box overlaps that of an object, of any category, by half or more (IoU).

    `whole image` is the same for boxes around the whole images.

    Args:
        data: PASCAL VOC (`Annotations/`, `JPEGImages/`, `ImageSets/Main/SPLIT.txt`), or boxes in COCO's format.
        seed: nothing here is random.
    """
    split, every = read_objects(data, settings.split)
    images = spread([image for image in every if image.names], settings.images)
    if not images:
        raise ValueError(f"no image of {data} ({split}) has a box")
    features = features_of(backbone, settings.level)

    def load(image: Boxed) -> tuple[Boxed, Tensor]:
        how = backbone.preprocessing
        return image, normalized(how.reading.levels(image.photo), how.mean, how.std)

    def work(loaded: list[tuple[Boxed, Tensor]]) -> list[tuple[list[bool], bool]]:
        """Of each image, which of its objects the box is one's; whether a box around the image would be one's."""
        found = []
        for image, pixels in loaded:
            vectors, grid, cell = features(pixels)
            mask = lost(vectors, settings.patches) if settings.rule == "lost" else tokencut(vectors)
            box = in_pixels(cell_box(*mask, grid), cell, (pixels.shape[1], pixels.shape[2]))
            whole = overlaps((0, 0, pixels.shape[2], pixels.shape[1]), image.boxes)
            found.append(((overlaps(box, image.boxes) >= 0.5).tolist(), bool((whole >= 0.5).any())))
        return found

    shown = f"discover {settings} {[(image.boxes.tolist(), image.names) for image in images]}"
    with own_folder(features_key(backbone, data, [image.photo for image in images], shown)) as folder:
        parts, kept, left_out = each_readable(images, load, work, 8, data, folder)
    images = [images[number] for number in kept]
    hits = [np.array(hit) for part in parts for hit, _ in part]
    filled = [whole for part in parts for _, whole in part]
    return Outcome(
        {"CorLoc": 100 * float(np.mean([hit.any() for hit in hits])), "whole image": 100 * float(np.mean(filled))},
        described(data, [image.photo for image in images], len(images)),
        (seed,),
        split=split,
        items={"category": by_category(images, hits)},
        left_out=left_out,
    )


def read_objects(data: Path, split: str | None) -> tuple[str, list[Boxed]]:
    """The split's name, and its images with the boxes that count: of COCO's all but crowds, of VOC's the difficult ones too.

    Raises:
        ValueError: there is no such split, or something is wrong in it.
    """
    if has_boxes(data):
        split = split or "trainval"
        return split, read_boxes(data, split)
    split = split or "train"
    found = read_split(data, split, "detection")
    names = [category.name for category in found.categories]
    return split, [
        Boxed(photo.path, photo.boxes.astype(np.float64).round(), tuple(names[label - 1] for label in photo.labels))
        for photo in found.photos
    ]


def by_category(images: list[Boxed], hits: list[NDArray[np.bool_]]) -> dict[str, dict[str, float]]:
    """Of the images with a category, `CorLoc`: the percentage in which the box is that of an object of the category."""
    found: dict[str, list[bool]] = defaultdict(list)
    for image, hit in zip(images, hits, strict=True):
        names = np.array(image.names)
        for name in sorted(set(image.names)):
            found[name].append(bool(hit[names == name].any()))
    return {name: {"CorLoc": 100 * float(np.mean(own)), "images": len(own)} for name, own in sorted(found.items())}


def overlaps(box: Box, others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of a box with each of others: (N, 4) -> (N,)."""
    corners = np.array(box)
    sides = np.minimum(corners[2:], others[:, 2:]) - np.maximum(corners[:2], others[:, :2])
    shared = sides.clip(min=0).prod(1)
    union = (corners[2:] - corners[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - shared
    return np.asarray(shared / union)


# ---- descriptions of cells -------------------------------------------------------------------------------------------


def features_of(
    backbone: Backbone, level: int | None = None
) -> Callable[[Tensor], tuple[Tensor, Grid, tuple[float, float]]]:
    """What describes the cells of a normalized image (C, H, W): vectors (h * w, D), the grid, and a cell's sides in pixels.

    Of a vision transformer the keys of the last attention. Of other models a map, standardized as a whole, as LOST does
    with ResNets and VGG: what goes into their pooling, which no negative value enters. Of a ResNet of plain blocks at half
    its stride, by dilation.

    Args:
        level: of the map; null for the keys, or for what goes into the pooling where there are none.
    """
    model = backbone.model
    attention = last_attention(model) if level is None else None
    info = getattr(model, "feature_info", None) or [{}]
    cell = int(dict(info[-1]).get("reduction") or backbone.multiple)
    if level in (None, -1):
        with suppress(ValueError):  # not a ResNet
            backbone, cell = replace(backbone, model=with_stride_one(model, "layer4")), cell // 2

    def described_cells(pixels: Tensor) -> tuple[Tensor, Grid, tuple[float, float]]:
        height, width = pixels.shape[1:]
        images = F.pad(pixels, (0, -width % cell, 0, -height % cell))[None]  # zeros, as in both papers' code
        entered: list[Tensor] = []
        hook = attention and attention.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        try:
            if level is None and attention is None:
                features = backbone.unpooled(images)[0]  # (D, h, w)
            else:
                features = backbone.maps(images, (-1 if level is None else level,))[0][0].float()
        finally:
            if hook:
                hook.remove()
        grid = (features.shape[1], features.shape[2])
        sides = images.shape[2] / grid[0], images.shape[3] / grid[1]
        if attention is not None and entered:
            return keys(attention, entered[-1])[0, -grid[0] * grid[1] :].float(), grid, sides
        vectors = features.flatten(1).T
        return F.layer_norm(vectors, vectors.shape), grid, sides

    return described_cells


def last_attention(model: nn.Module) -> Any:
    """The attention of a vision transformer's last block; None of any other model."""
    blocks: Any = getattr(model, "blocks", None)
    attention = getattr(blocks[-1], "attn", None) if blocks and hasattr(model, "num_prefix_tokens") else None
    return attention if hasattr(attention, "qkv") or hasattr(attention, "k_proj") else None


def keys(attention: Any, tokens: Tensor) -> Tensor:
    """The keys of tokens that enter an attention of timm, all heads side by side: (B, N, C) -> (B, N, D)."""
    projection = getattr(attention, "k_proj", None)
    if projection is not None:
        return F.linear(tokens, projection.weight, projection.bias)
    weight, bias = attention.qkv.weight, attention.qkv.bias  # of queries, keys and values, one below the other
    return F.linear(tokens, weight.chunk(3)[1], None if bias is None else bias.chunk(3)[1])


# ---- which cells are the object --------------------------------------------------------------------------------------


def lost(vectors: Tensor, patches: int) -> tuple[NDArray[np.bool_], int]:
    """LOST's cells of the object, and the seed among them: (N, D) -> (N,).

    Two cells are similar if their product is positive. The seed is the cell similar to the fewest others; cells that
    are nearly as rare, and similar to the seed, vote with their products.

    Args:
        patches: how many of the rarest cells may vote.
    """
    alike = torch.cat([(rows @ vectors.T > 0).sum(1) for rows in torch.split(vectors, ROWS)])
    alike = alike - (vectors.square().sum(1) > 0).long()  # with the others, not with itself
    rarest = alike.argsort(stable=True)[:patches]
    voters = rarest[vectors[rarest] @ vectors[rarest[0]] > 0]
    return ((vectors[voters] @ vectors.T).sum(0) > 0).cpu().numpy(), int(rarest[0])


def tokencut(vectors: Tensor) -> tuple[NDArray[np.bool_], int]:
    """TokenCut's cells of the object, and the seed among them: (N, D) -> (N,).

    Cells with a cosine above `TAU` are connected; the normalized cut's second smallest eigenvector is split at its
    mean. The object is the part with the cell furthest from zero.
    """
    unit = F.normalize(vectors, dim=1)
    weights = (unit @ unit.T > TAU).double().clamp(min=FAINT)
    scale = weights.sum(1).rsqrt()
    laplacian = torch.eye(len(weights), dtype=weights.dtype, device=weights.device) - scale[:, None] * weights * scale
    parted = torch.linalg.eigh(laplacian)[1][:, 1] * scale
    seed = int(parted.abs().argmax())
    above = parted > parted.mean()
    return (above if bool(above[seed]) else ~above).cpu().numpy(), seed


def cell_box(mask: NDArray[np.bool_], seed: int, grid: Grid) -> Box:
    """The box around the cells that are connected with the seed through shared sides, in cells.

    Args:
        mask: cells of the object, (h * w,).
        seed: one of them.
    """
    height, width = grid
    left = mask.reshape(grid).copy()
    row, column = divmod(seed, width)
    front, rows, columns = [(row, column)], [row], [column]
    while front:
        row, column = front.pop()
        for y, x in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= y < height and 0 <= x < width and left[y, x]:
                left[y, x] = False
                front.append((y, x))
                rows.append(y)
                columns.append(x)
    return min(columns), min(rows), max(columns) + 1, max(rows) + 1


def in_pixels(box: Box, cell: tuple[float, float], size: Grid) -> Box:
    """A box of cells in pixels, without what lies in the padding.

    Args:
        cell: height and width in pixels.
        size: height and width of the image.
    """
    x0, y0, x1, y1 = box
    return x0 * cell[1], y0 * cell[0], min(x1 * cell[1], size[1]), min(y1 * cell[0], size[0])
