"""The mask of a video's first frame, carried on from frame to frame by the features alone.

As in DAVIS's semi-supervised track and in Jabri et al., "Space-Time Correspondence as a Contrastive Random Walk"
(NeurIPS 2020): each cell of a frame takes the mean label of the most similar cells of the first frame and of the last
few, near the same place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clove_hub.data.clips import Clip, find_clips, read_objects
from clove_hub.data.files import described
from clove_hub.geometry import upsampled

from ..weights.backbone import Backbone, with_stride_one
from .processes import gather, share
from .reading import normalized, readable, settle, unless_broken
from .result import Outcome
from .scores import boundary_accuracy, region_similarity

VERSION = 1
RULE = "own"
RANDOMNESS = ""
PREPROCESSING = ("mean", "std")


@dataclass(frozen=True)
class Settings:
    level: int = -2
    """Which feature level: -1 is the last, -2 the one before (layer3 of a ResNet)."""
    fine: bool = True
    """Whether a ResNet's layer3 keeps the resolution of layer2, so that a cell is 8 pixels wide and not 16."""
    context: int = 20
    """How many frames before the present one are looked at, beside the first."""
    radius: int = 12
    """How far away, in cells, in both directions; 0 for everywhere. In the first frame too."""
    top_k: int = 10
    """How many of the most similar cells count."""
    temperature: float = 0.05
    """Divides the cosines before the softmax."""
    frames: int | None = None
    """At most this many of each clip, from its beginning; null for all."""

    def __post_init__(self) -> None:
        if min(self.context, self.radius) < 0 or self.top_k < 1 or self.temperature <= 0 or (self.frames or 3) < 3:
            raise ValueError(
                f"{self}: context and radius must not be negative, top_k and temperature must be positive, and frames "
                "at least 3, of which the first is given and the last does not count"
            )


def evaluate(backbone: Backbone, data: Path, settings: Settings, seed: int) -> Outcome:
    """`J&F`, `J` and `F` (percent): means over the objects of all clips of their means over the frames.

    As in DAVIS's own evaluation the first frame, whose mask is given, and the last one do not count.

    Args:
        data: DAVIS 2016 or 2017 (`JPEGImages/480p/CLIP`, `Annotations/480p/CLIP`, `ImageSets/2017/val.txt`), or the
            same without `480p`, with `val.txt` beside the two folders.
        seed: nothing here is random.
    """
    clips = find_clips(data, settings.frames)
    backbone = prepared(backbone, settings)

    def followed(clip: Clip) -> NDArray[np.float64]:
        return score(*follow(backbone, clip, settings))

    scores, problems = readable(gather(map(unless_broken(followed), share(clips))))
    left_out = settle(problems, data, "clips")  # whole clips: a frame carries the masks on to the next
    clips = [clip for clip, problem in zip(clips, problems, strict=True) if problem is None]
    region, contour = (100 * float(column.mean()) for column in np.concatenate(scores).T)
    files = [path for clip in clips for path in [*clip.frames, *clip.masks]]
    objects = {
        f"{clip.name}/{number}": {"J": 100 * float(j), "F": 100 * float(f)}
        for clip, rows in zip(clips, scores, strict=True)
        for number, (j, f) in enumerate(rows, start=1)
    }
    return Outcome(
        {"J&F": (region + contour) / 2, "J": region, "F": contour},
        described(data, files, len(clips)),
        (seed,),
        split="val",
        items={"object": objects},
        left_out=left_out,
    )


def prepared(backbone: Backbone, settings: Settings) -> Backbone:
    """The backbone with the map that the settings ask for.

    Raises:
        ValueError: `fine` is set, and the level or the model has no finer map.
    """
    if not settings.fine:
        return backbone
    if settings.level != -2 or not hasattr(backbone.model, "layer3"):
        raise ValueError("fine=true is for level=-2 of a ResNet (layer3): set fine=false for any other")
    return replace(backbone, model=with_stride_one(backbone.model, "layer3"))


def follow(backbone: Backbone, clip: Clip, settings: Settings) -> tuple[list[Tensor], list[Tensor]]:
    """Carries the mask of a clip's first frame through the others.

    Returns:
        The objects of all frames, and those predicted, of which the first frame's are given: each (H, W), numbers
        from 1; 0 is the background.

    Raises:
        ValueError: a frame or mask cannot be read or has another size, or the first mask has no object, or not all.
    """
    truths = [torch.from_numpy(objects) for objects in read_objects(clip)]
    predicted = truths[:1]
    height, width = truths[0].shape
    queue: list[tuple[Tensor, Tensor]] = []  # features and labels: the first frame, then the last few
    for path in clip.frames:
        photo = backbone.preprocessing.reading.levels(path)
        if photo.shape[:2] != (height, width):
            raise ValueError(f"{path} is {photo.shape[1]}x{photo.shape[0]} pixels, the clip's first {width}x{height}")
        pixels = backbone.padded(normalized(photo, backbone.preprocessing.mean, backbone.preprocessing.std)[None])
        features = F.normalize(backbone.maps(pixels, (settings.level,))[0][0].float(), dim=0)  # (C, h, w)
        if not queue:
            labels = _first_labels(truths[0], pixels.shape[2:], features.shape[1:]).to(features.device)
        else:
            known = [frame for frame, _ in queue], [labels for _, labels in queue]
            labels = propagate(features, *known, settings.radius, settings.top_k, settings.temperature)
            full = upsampled(labels, (pixels.shape[2], pixels.shape[3]))
            predicted.append(full[:, :height, :width].argmax(0).cpu())
        queue.append((features, labels))
        if len(queue) > settings.context + 1:
            del queue[1]
    return truths, predicted


def score(truths: list[Tensor], predicted: list[Tensor]) -> NDArray[np.float64]:
    """J and F of each object of the first frame, means over the frames between the first and the last: (objects, 2)."""
    scores = []
    for found, truth in zip(predicted[1:-1], truths[1:-1], strict=True):
        pairs = [(found == number, truth == number) for number in range(1, int(truths[0].max()) + 1)]
        scores.append([(region_similarity(*pair), boundary_accuracy(*pair)) for pair in pairs])
    means: NDArray[np.float64] = np.array(scores).mean(0)
    return means


def _first_labels(mask: Tensor, size: torch.Size, grid: torch.Size) -> Tensor:
    """The share of each object (0 is the background) in each cell of the first frame: (objects + 1, h, w)."""
    shares = F.one_hot(mask.long()).permute(2, 0, 1).float()
    shares = F.pad(shares[None], (0, size[1] - mask.shape[1], 0, size[0] - mask.shape[0]), mode="replicate")
    return F.adaptive_avg_pool2d(shares, (grid[0], grid[1]))[0]


def propagate(
    query: Tensor, keys: list[Tensor], labels: list[Tensor], radius: int, top_k: int, temperature: float
) -> Tensor:
    """The labels of a frame from those of other frames.

    Each cell takes the mean of the labels of the `top_k` most similar cells of all frames together, weighted by the
    softmax of their cosine / temperature.

    Args:
        query: unit features of the frame, (C, h, w).
        keys: unit features of the other frames.
        labels: of the other frames, each (L, h, w).
        radius: cells further away than this, across or down, are not looked at; 0 for no limit.

    Returns:
        (L, h, w).
    """
    height, width = query.shape[1:]
    bank, values = torch.stack(keys, 1), torch.stack(labels, 1)  # (C, T, h, w), (L, T, h, w)
    columns = torch.arange(width, device=query.device)
    result = torch.empty(len(values), height, width, device=query.device)
    for row in range(height):  # a row at a time: few of the keys' rows are near enough
        near = slice(max(0, row - radius), row + radius + 1) if radius else slice(None)
        similar = torch.einsum("cx,ctvu->xtvu", query[:, row], bank[:, :, near])  # (w, T, rows, w)
        if radius:
            similar.masked_fill_(((columns[:, None] - columns).abs() > radius)[:, None, None], -torch.inf)
        similar = similar.flatten(1)
        best, where = similar.topk(min(top_k, similar.shape[1]), dim=1)
        weights = (best / temperature).softmax(1)  # (w, k); what is too far away has none
        result[:, row] = (values[:, :, near].flatten(1)[:, where] * weights).sum(2)
    return result
