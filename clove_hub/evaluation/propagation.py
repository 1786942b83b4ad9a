"""Propagation of masks through a video by the features of its frames: the rules, as data, and their computation.

Everything here is a pure function of tensors. In all rules, each cell of a frame gets the mean label of the most
similar cells of the first frame and of the last few, weighted by the softmax of cosine / temperature.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clove_hub.geometry import upsampled

Size = tuple[int, int]
"""Height and width."""
Known = tuple[Tensor, Tensor]
"""The unit features (C, h, w) and the labels (L, h, w) of a frame."""


@dataclass(frozen=True)
class Rule:
    """The settings that define a way of propagating masks."""

    cell: int
    """Of a network's maps, the one whose cells are nearest to this many pixels a side is taken."""
    fine: bool
    """Whether layer3 of a ResNet of plain blocks loses its stride, so that its cells are 8 pixels and not 16."""
    dilated: bool
    """Whether layer3 is dilated where it has lost its stride."""
    padded: bool
    """Whether a ResNet of plain blocks sees frames padded to whole cells, as other networks do."""
    short_side: int | None
    """Pixels of the short side of the frames that the network sees; the other becomes a multiple of 64. None: own size."""
    first_labels: Literal["sampled", "nearest", "mean"]
    """A cell's label in the first frame: bilinear between the pixels at its center, the pixel there, or the mean of all."""
    copies: bool
    """Whether frames before the first one are copies of it; otherwise there are none."""
    first_restricted: bool
    """Whether the radius holds in the first frame too."""
    circle: bool
    """Whether cells nearer than the radius count; otherwise those no further across and no further down."""
    ties: bool
    """Whether all cells as similar as the last of the `top_k` count."""
    rescaled: bool
    """Whether each label is scaled to 0 .. 1 over the frame before the greatest is taken."""
    context: int
    radius: int
    top_k: int
    temperature: float


RULES = {
    "videowalk": Rule(
        cell=8,
        fine=True,
        dilated=False,
        padded=False,
        short_side=None,
        first_labels="sampled",
        copies=True,
        first_restricted=False,
        circle=True,
        ties=False,
        rescaled=False,
        context=20,
        radius=12,
        top_k=10,
        temperature=0.05,
    ),
    "dino": Rule(
        cell=16,
        fine=False,
        dilated=False,
        padded=True,
        short_side=480,
        first_labels="nearest",
        copies=False,
        first_restricted=True,
        circle=False,
        ties=True,
        rescaled=True,
        context=7,
        radius=12,
        top_k=5,
        temperature=0.1,
    ),
    "ours": Rule(
        cell=8,
        fine=True,
        dilated=True,
        padded=True,
        short_side=None,
        first_labels="mean",
        copies=False,
        first_restricted=True,
        circle=False,
        ties=False,
        rescaled=False,
        context=20,
        radius=12,
        top_k=10,
        temperature=0.05,
    ),
}
"""`videowalk`: Jabri et al., "Space-Time Correspondence as a Contrastive Random Walk" (NeurIPS 2020). `dino`: Caron et al.,
"Emerging Properties in Self-Supervised Vision Transformers" (ICCV 2021)."""


def seen_size(size: Size, multiple: int, rule: Rule) -> Size:
    """The size at which the network sees frames.

    Args:
        size: of the frames.
        multiple: of which the network needs both sides to be one; 1 if it needs none.
    """
    if rule.short_side is None:
        return size[0] + -size[0] % multiple, size[1] + -size[1] % multiple
    short, long = rule.short_side, rule.short_side * max(size) // (64 * min(size)) * 64
    height, width = (long, short) if size[0] > size[1] else (short, long)
    return height - height % multiple, width - width % multiple


def carried(maps: Iterable[Tensor], mask: Tensor, seen: Size, rule: Rule) -> Iterator[tuple[Tensor, Tensor]]:
    """The labels (L, h, w) and the objects (H, W) of each frame after the first.

    Args:
        maps: features of the frames, the first one first, each (C, h, w).
        mask: the objects of the first frame, (H, W): numbers from 1; 0 is the background.
        seen: the size that the maps cover, as `seen_size` gives it.
    """
    frames = (F.normalize(one.float(), dim=0) for one in maps)
    features = next(frames)
    first = features, first_labels(mask, seen, (features.shape[1], features.shape[2]), rule).to(features.device)
    recent = deque([first] * rule.context if rule.copies else [], maxlen=rule.context)
    for features in frames:
        labels = propagate(features, [first, *recent], rule)
        recent.append((features, labels))
        yield labels, objects(labels, seen, (mask.shape[0], mask.shape[1]), rule)


def first_labels(mask: Tensor, seen: Size, grid: Size, rule: Rule) -> Tensor:
    """How much each cell of the first frame belongs to each object, 0 being the background: (L, h, w).

    Args:
        mask: (H, W).
        seen: the size that the grid covers; what the mask does not reach is padding.
    """
    classes = int(mask.max()) + 1
    if rule.first_labels == "nearest":
        return F.one_hot(_nearest(mask, grid), classes).permute(2, 0, 1).float()
    shares = F.one_hot(mask.long(), classes).permute(2, 0, 1).float()
    if rule.short_side is None:
        shares = F.pad(shares[None], (0, seen[1] - mask.shape[1], 0, seen[0] - mask.shape[0]), mode="replicate")[0]
    return upsampled(shares, grid) if rule.first_labels == "sampled" else F.adaptive_avg_pool2d(shares, grid)


def propagate(query: Tensor, known: Sequence[Known], rule: Rule) -> Tensor:
    """The labels of a frame from those of other frames: (L, h, w).

    Args:
        query: unit features of the frame, (C, h, w).
        known: the first frame, and further ones.
    """
    height, width = query.shape[1:]
    bank, labels = (torch.stack(list(part), 1) for part in zip(*known, strict=True))  # (C, T, h, w), (L, T, h, w)
    columns = torch.arange(width, device=query.device)
    result = torch.empty(len(labels), height, width, device=query.device)
    for row in range(height):  # a row at a time: few of the keys' rows are near enough
        cosines, values = [], []
        for frames, limited in ((slice(0, 1), rule.first_restricted), (slice(1, None), True)):
            near = slice(max(0, row - rule.radius), row + rule.radius + 1)
            rows = near if limited and rule.radius else slice(None)
            similar = torch.einsum("cx,ctvu->xtvu", query[:, row], bank[:, frames, rows])  # (w, T, rows, w)
            if limited and rule.radius:
                down = torch.arange(height, device=query.device)[rows, None] - row
                across = columns[:, None, None] - columns  # (w, 1, w)
                far = across.abs() > rule.radius
                if rule.circle:
                    far = across**2 + down**2 >= rule.radius**2
                similar.masked_fill_(far[:, None], -torch.inf)
            cosines.append(similar.flatten(1))
            values.append(labels[:, frames, rows].flatten(1))
        similar, value = torch.cat(cosines, 1), torch.cat(values, 1)  # (w, N), (L, N)
        best, where = similar.topk(min(rule.top_k, similar.shape[1]), dim=1)
        if rule.ties:
            similar.masked_fill_(similar < best[:, -1:], -torch.inf)
            result[:, row] = value @ (similar / rule.temperature).softmax(1).T
        else:  # what is too far away has no weight
            result[:, row] = (value[:, where] * (best / rule.temperature).softmax(1)).sum(2)
    return result


def objects(labels: Tensor, seen: Size, size: Size, rule: Rule) -> Tensor:
    """The object with the greatest label at each pixel, on the CPU: (L, h, w) -> (H, W).

    Args:
        seen: the size that the labels cover.
        size: of the frame.
    """
    full = upsampled(labels, seen)
    if rule.rescaled:
        full = full - full.amin((1, 2), keepdim=True)
        full = full / full.amax((1, 2), keepdim=True).clamp(min=torch.finfo(full.dtype).tiny)
    found = full.argmax(0).cpu()
    return found[: size[0], : size[1]] if rule.short_side is None else _nearest(found, size)


def _nearest(mask: Tensor, size: Size) -> Tensor:
    """A mask with numbers below 256, brought to another size by its nearest pixels: (H, W) -> int64."""
    image = Image.fromarray(mask.cpu().numpy().astype(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(image)).long()
