"""The mask of a video's first frame, propagated by the features alone, as in DAVIS's semi-supervised track.

A rule from `propagation.RULES` defines how a mask is propagated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clove_hub.data.clips import Clip, find_clips, read_objects
from clove_hub.data.files import described
from clove_hub.geometry import upsampled
from clove_hub.settings import fill

from ..weights.backbone import Backbone, is_plain_resnet, nearest_level, with_stride_one
from .kept import features_key, own_folder
from .processes import gather, share
from .progress import tracked
from .propagation import RULES, Rule, carried, seen_size
from .reading import normalized, readable, settle, unless_broken
from .result import Outcome
from .scores import boundary_accuracy, over_frames, region_similarity
from .unfinished import once

VERSION = 2
RULE = "videowalk"
RANDOMNESS = ""
PREPROCESSING = ("mean", "std")
OPEN = ("context", "radius", "top_k", "temperature")
"""Settings that the rule gives where they are not given."""
LAYER3 = -2
"""Its level in a ResNet."""


@dataclass(frozen=True)
class Settings:
    rule: Literal["videowalk", "dino", "ours"] = "videowalk"
    """How masks are propagated; settings that are null take the rule's value."""
    level: int | None = None
    """Feature level: -1 is the last, -2 the one before. Null: layer3 of a ResNet, the last of a ViT, and for other
    networks the one whose cells are nearest to 8 pixels wide (`dino`: 16)."""
    fine: bool | None = None
    """Whether a ResNet's layer3 keeps the resolution of layer2, so that a cell is 8 pixels wide and not 16. Null: the
    rule's value for plain ResNets, false for other networks and levels."""
    context: int | None = None
    """Number of previous frames to use, in addition to the first. Null: 20 (`dino`: 7)."""
    radius: int | None = None
    """Maximum distance in cells; 0 for no limit. Null: 12."""
    top_k: int | None = None
    """How many of the most similar cells count. Null: 10 (`dino`: 5)."""
    temperature: float | None = None
    """Divides the cosines before the softmax. Null: 0.05 (`dino`: 0.1)."""
    frames: int | None = None
    """At most this many frames of each clip, from its beginning; null for all."""

    def __post_init__(self) -> None:
        fill(self, {name: getattr(RULES[self.rule], name) for name in OPEN})
        rule = self.followed
        if min(rule.context, rule.radius) < 0 or rule.top_k < 1 or rule.temperature <= 0 or (self.frames or 3) < 3:
            raise ValueError(
                f"{self}: context and radius must not be negative, top_k and temperature must be positive, and frames "
                "at least 3, of which the first is given and the last is not scored"
            )

    @property
    def followed(self) -> Rule:
        """The rule, with the given settings in place of its own."""
        return replace(RULES[self.rule], **{name: getattr(self, name) for name in OPEN})


def evaluate(backbone: Backbone, data: Path, settings: Settings, seed: int) -> Outcome:
    """`J&F`, `J` and `F` (percent): means over the objects of all clips of their means over the frames.

    `recall` is the mean over the objects of the share of frames above 50 %, `decay` that of what is lost from the first
    quarter of the frames to the last. As in DAVIS's own evaluation the first frame, whose mask is given, and the last one do
    not count.

    Args:
        data: DAVIS 2016 or 2017 (`JPEGImages/480p/CLIP`, `Annotations/480p/CLIP`, `ImageSets/2017/val.txt`), or the
            same without `480p`, with `val.txt` beside the two folders.
        seed: nothing here is random.
    """
    clips = find_clips(data, settings.frames)
    backbone, settings = prepared(backbone, settings)

    def followed(clip: Clip) -> Tensor:
        return torch.from_numpy(score(*follow(backbone, clip, settings)))

    files = [path for clip in clips for path in [*clip.frames, *clip.masks]]
    with own_folder(features_key(backbone, data, files, f"propagate {settings} {clips}")) as folder:

        def kept(unit: tuple[int, Clip]) -> Tensor:
            return once(folder / f"{unit[0]}.clip", partial(followed, unit[1]))

        own = tracked(share(list(enumerate(clips))), "following the clips")
        found, problems = readable(gather(map(unless_broken(kept), own)))
    scores = [one.numpy() for one in found]
    left_out = settle(problems, data, "clips")  # whole clips: a frame carries the masks on to the next
    clips = [clip for clip, problem in zip(clips, problems, strict=True) if problem is None]
    means = figures(np.concatenate(scores).mean(0))
    files = [path for clip in clips for path in [*clip.frames, *clip.masks]]
    return Outcome(
        {"J&F": (means["J"] + means["F"]) / 2, **means},
        described(data, files, len(clips)),
        (seed,),
        split="val",
        items={
            "object": {
                f"{clip.name}/{number}": figures(own)
                for clip, objects in zip(clips, scores, strict=True)
                for number, own in enumerate(objects, start=1)
            }
        },
        left_out=left_out,
        chosen={"level": settings.level, "fine": settings.fine},
    )


def prepared(backbone: Backbone, settings: Settings) -> tuple[Backbone, Settings]:
    """The backbone with the map that the settings ask for, and the settings with `level` and `fine` as they are then.

    Raises:
        ValueError: `fine` is set, and the level or the model has no finer map.
    """
    rule, plain, level, fine = settings.followed, is_plain_resnet(backbone.model), settings.level, settings.fine
    if level is None:
        level = LAYER3 if plain or fine else nearest_level(backbone.model, rule.cell)
    can = plain and level == LAYER3
    if fine and not can:
        raise ValueError(
            f"fine=true is for layer3 of a ResNet of plain blocks (level=-2), not for level={level} of {backbone.name}: leave "
            "fine out to use the map as it is"
        )
    fine = can and rule.fine if fine is None else fine
    settings = replace(settings, level=level, fine=fine)
    if not fine:
        return backbone, settings
    return replace(backbone, model=with_stride_one(backbone.model, "layer3", rule.dilated)), settings


def follow(backbone: Backbone, clip: Clip, settings: Settings) -> tuple[list[Tensor], list[Tensor]]:
    """Propagate the mask of a clip's first frame through the others.

    Args:
        backbone: as `prepared` gives it, with the settings.

    Returns:
        The objects of all frames, and those predicted, of which the first frame's are given: each (H, W), numbers
        from 1; 0 is the background.

    Raises:
        ValueError: a frame or mask cannot be read or has another size, or the first mask has no object, or not all.
    """
    truths = [torch.from_numpy(found) for found in read_objects(clip)]
    height, width = truths[0].shape
    rule, look = settings.followed, backbone.preprocessing
    whole = rule.padded or not is_plain_resnet(backbone.model)
    seen = seen_size((height, width), backbone.multiple if whole else 1, rule)

    def maps() -> Iterator[Tensor]:
        for path in clip.frames:
            photo = look.reading.levels(path)
            if photo.shape[:2] != (height, width):
                raise ValueError(
                    f"{path} is {photo.shape[1]}x{photo.shape[0]} pixels, the clip's first {width}x{height}"
                )
            pixels = normalized(photo, look.mean, look.std)[None]
            if rule.short_side is not None:
                pixels = upsampled(pixels, seen)
            elif whole:
                pixels = backbone.padded(pixels)
            assert settings.level is not None
            yield backbone.maps(pixels, (settings.level,))[0][0]

    return truths, [truths[0], *(mask for _, mask in carried(maps(), truths[0], seen, rule))]


def score(truths: list[Tensor], predicted: list[Tensor]) -> NDArray[np.float64]:
    """Of each object of the first frame J and F: mean, recall and decay over the frames between the first and the last.

    Returns:
        (objects, 2, 3), shares.
    """
    values = []
    for found, truth in zip(predicted[1:-1], truths[1:-1], strict=True):
        pairs = [(found == number, truth == number) for number in range(1, int(truths[0].max()) + 1)]
        values.append([(region_similarity(*pair), boundary_accuracy(*pair)) for pair in pairs])
    return np.moveaxis(over_frames(np.array(values)), 0, 2)


def figures(shares: NDArray[np.float64]) -> dict[str, float]:
    """What `score` gives of an object, (2, 3), by name and in percent."""
    named = {}
    for number, kind in enumerate(("", " recall", " decay")):
        for measure, value in zip("JF", shares[:, number], strict=True):
            named[f"{measure}{kind}"] = 100 * float(value)
    return named
