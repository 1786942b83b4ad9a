"""Batch norm and one linear layer on frozen patch features, trained on crops: the linear segmentation of DINOv2 and DINOv3.

Oquab et al., "DINOv2" (2023), section 7.4; Siméoni et al., "DINOv3" (2025), whose released evaluation has this
schedule. The backbone processes new crops in every step, so no features are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial, reduce
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from clove_hub.data.masks import VOID, Pair, Segmented, open_segmented
from clove_hub.geometry import upsampled
from clove_hub.settings import fill
from clove_hub.views import Purpose, stream

from ..weights.backbone import Backbone
from .augment import distorted, varied_box
from .kept import features_key, own_folder
from .processes import gather, share, world
from .progress import tracked
from .reading import MOST_OBLONG, each_readable, in_threads, normalized, resized
from .result import Outcome
from .scores import confusion, segmentation_scores
from .segmenting import classes_at, nearest, outcome, readable_part
from .unfinished import Training, state_in

VERSION = 1
RULE = "dinov3"
RANDOMNESS = "the layer, its images and their crops"
PREPROCESSING = ("mean", "std")
_FIRST_RATE = 1e-6


@dataclass(frozen=True)
class Rule:
    """The settings that define a way of training and testing the layer."""

    levels: tuple[int, ...]
    crop: int
    stride: Fraction
    """Of the crop, from one window to the next."""
    scales: tuple[float, float]
    """Of `size` the least and the greatest shorter side of a training image."""
    weight_decay: float
    dropout: float
    cosine: bool
    """Whether the learning rate falls to zero along a cosine behind the warm-up; otherwise along a line."""
    ratios: tuple[float, ...] = (1.0,)
    """Of `size` the shorter sides at which a test image is seen. If more than one, with its mirror image at each, and the mean
    of the probabilities counts."""


DINOV3 = Rule(
    levels=(-1,), crop=512, stride=Fraction(2, 3), scales=(0.5, 2.0), weight_decay=1e-3, dropout=0.1, cosine=True
)
RULES = {
    "dinov3": DINOV3,
    "dinov2": replace(DINOV3, weight_decay=1e-4, dropout=0.0, cosine=False),
    "dinov2-ms": Rule(
        levels=(-4, -3, -2, -1),
        crop=640,
        stride=Fraction(1, 2),
        scales=(1.0, 3.0),
        weight_decay=1e-4,
        dropout=0.0,
        cosine=False,
        ratios=(1.0, 1.32, 1.73, 2.28, 3.0),
    ),
}
OPEN = ("levels", "crop", "weight_decay", "dropout")
"""Settings that the rule gives where they are not given."""


@dataclass(frozen=True)
class Settings:
    rule: Literal["dinov3", "dinov2", "dinov2-ms"] = "dinov3"
    """How the layer is trained and tested; settings that are null take the rule's value."""
    levels: tuple[int, ...] | None = None
    """Feature levels, concatenated: -1 is the last (layer4 of a ResNet), -2 the one before. Null: the last one
    (`dinov2-ms`: the last four)."""
    steps: int = 40_000
    """Training steps."""
    batch: int = 16
    """Crops in a training step."""
    crop: int | None = None
    """Side in pixels of training crops and test windows. Null: 512 (`dinov2-ms`: 640)."""
    size: int | None = None
    """The shorter side of a test image in pixels; that of a training image is 0.5 to 2 times this (`dinov2-ms`: 1 to 3
    times). Null: equal to `crop`."""
    stride: int | None = None
    """Pixels from one window to the next. Null: two thirds of `crop`, 341 of 512 (`dinov2-ms`: half of it)."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; it falls to zero along a cosine (`dinov2`, `dinov2-ms`: linearly)."""
    weight_decay: float | None = None
    """Weight decay of AdamW. Null: 0.001 (`dinov2`, `dinov2-ms`: 0.0001)."""
    warm_up: float = 0.0375
    """Fraction of the steps over which the learning rate rises."""
    dropout: float | None = None
    """Fraction of a crop's channels that are dropped in training. Null: 0.1 (`dinov2`, `dinov2-ms`: 0)."""
    seeds: int = 1
    """Number of trainings, with the given seed and the following ones."""
    train: str = "train"
    """Name of the training split."""
    test: str = "val"
    """Name of the test split."""
    train_images: int | None = None
    """At most this many, spread evenly over the list; null for all."""
    test_images: int | None = None
    """Like `train_images`, for the test split."""

    def __post_init__(self) -> None:
        fill(self, {name: getattr(RULES[self.rule], name) for name in OPEN})
        rule = self.followed
        counts = (self.steps, self.batch, self.short, rule.crop, self.apart, self.seeds, len(rule.levels))
        limits = [limit for limit in (self.train_images, self.test_images) if limit is not None]
        if min(*counts, *limits) < 1 or self.learning_rate <= 0 or rule.weight_decay < 0:
            raise ValueError(f"{self}: all but weight_decay must be positive, with at least one level")
        if not 0 <= self.warm_up < 1 or not 0 <= rule.dropout < 1:
            raise ValueError(f"{self}: warm_up and dropout must be at least 0 and below 1")
        if self.apart > rule.crop:
            raise ValueError(f"{self}: the stride must not exceed the crop, or some pixels would be in no window")

    @property
    def followed(self) -> Rule:
        """The rule, with the given settings in place of its own."""
        return replace(RULES[self.rule], **{name: getattr(self, name) for name in OPEN})

    @property
    def short(self) -> int:
        """The shorter side of a test image in pixels."""
        return self.followed.crop if self.size is None else self.size

    @property
    def apart(self) -> int:
        """Pixels from one window to the next."""
        rule = self.followed
        return max(int(rule.crop * rule.stride), 1) if self.stride is None else self.stride


def evaluate(backbone: Backbone, data: Path, settings: Settings, seed: int) -> Outcome:
    """`mIoU` and `pixel accuracy` of the test images, means over the seeds.

    Args:
        data: images with a mask each, in one of the layouts of `open_segmented`.
    """
    train = open_segmented(data, settings.train).spread(settings.train_images)
    test = open_segmented(data, settings.test).spread(settings.test_images)
    train, unread = readable_part(backbone.preprocessing, data, train, settings.train)
    test, unread_tests = readable_part(backbone.preprocessing, data, test, settings.test)
    seeds = list(range(seed, seed + settings.seeds))
    matrices, files = [], [path for pair in train.pairs + test.pairs for path in pair]
    with own_folder(features_key(backbone, data, files, f"linear-seg {settings} {seed} {train} {test}")) as folder:
        for number in seeds:
            head = trained(backbone, train, settings, number, folder / f"{number}.unfinished")
            matrices.append(tested(backbone, head, data, test, settings, folder / f"{number}.tested"))
    scores = [segmentation_scores(matrix) for matrix in matrices]
    return outcome(data, [train, test], settings.test, seeds, scores, matrices, unread + unread_tests)


# ---- training --------------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Features (B, C, h, w) -> logits (B, K, h, w)."""

    def __init__(self, channels: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.layer = nn.Conv2d(channels, classes, 1)
        with torch.no_grad():
            self.layer.weight.copy_(0.01 * torch.randn(self.layer.weight.shape, generator=generator))
            self.layer.bias.zero_()  # type: ignore[union-attr]

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layer(self.norm(features))
        return logits


def trained(backbone: Backbone, part: Segmented, settings: Settings, seed: int, kept: Path | None = None) -> nn.Module:
    """Train a layer on the images. All processes must call it, and get the same.

    The features of a step do not depend on the layer: with W processes those of W steps are computed at once, and each
    process then takes all of these steps.

    Args:
        kept: where the state of the training is saved, to resume from.
    """
    generator, rule = torch.Generator().manual_seed(seed), settings.followed

    def begun(channels: int) -> Training:
        head = Head(channels, len(part.classes), generator).to(backbone.device).train()
        optimizer = torch.optim.AdamW(head.parameters(), weight_decay=rule.weight_decay)  # the rate is each step's
        return Training(head, optimizer, generator)

    (state,) = gather(state_in(kept) for _ in share([None]))
    training = begun(len(state["layer"]["norm.weight"])) if state else None
    done = training.restore(state) if training and state else 0
    size, own = world()[1], share(range(done, settings.steps))
    load = partial(_drawn, backbone, part, settings, seed)
    loads = in_threads(load, [range(step * settings.batch, (step + 1) * settings.batch) for step in own])
    for first in tracked(range(done, settings.steps, size), f"training, seed {seed}"):
        seen = gather(
            _features(backbone, next(loads), settings) for _ in share(range(first, min(first + size, settings.steps)))
        )
        for step, (features, truth, shares) in enumerate(seen, first):
            training = training or begun(features.shape[1])
            left = (torch.rand(features.shape[:2], generator=generator) >= rule.dropout) / (1 - rule.dropout)
            features = features.to(backbone.device) * left.to(backbone.device)[:, :, None, None]
            rate = learning_rate(step, settings.steps, round(settings.warm_up * settings.steps), rule.cosine)
            learn(training.layer, training.optimizer, features, truth, settings.learning_rate * rate, shares)
            if not world()[0]:
                training.keep(kept, step + 1, step + 1 == settings.steps)
    assert training is not None
    return training.layer.eval()


def learn(
    head: nn.Module,
    rule: torch.optim.Optimizer,
    features: Tensor,
    truth: Tensor,
    rate: float,
    shares: tuple[float, float] = (1.0, 1.0),
) -> float:
    """Take one step and return the cross-entropy before it. Nothing happens if no pixel has a class.

    Args:
        features: (B, C, h, w).
        truth: uint8 (B, H, W), 255 where there is no class.
        shares: the parts of the height and of the width of the features that the truth covers.
    """
    counted = int((truth != VOID).sum())
    if not counted:
        return 0.0
    for group in rule.param_groups:
        group["lr"] = rate
    loss, size = 0.0, (truth.shape[1], truth.shape[2])
    with torch.enable_grad():
        logits = head(features)
        slopes = torch.empty_like(logits)
        for number, (one, mask) in enumerate(zip(logits.detach(), truth, strict=True)):
            # Image by image: the logits of 150 classes at the size of all crops would take gigabytes. And with the
            # pixels in one row: the loss over maps adds up in any order on an accelerator.
            one.requires_grad_()
            pixels, classes = upsampled(one, size, shares).flatten(1).T, mask.to(one.device).long().flatten()
            wrong = F.cross_entropy(pixels, classes, ignore_index=VOID, reduction="sum") / counted
            (slopes[number],) = torch.autograd.grad(wrong, one)
            loss += float(wrong.detach())
        rule.zero_grad()
        logits.backward(slopes)
    rule.step()
    return loss


def learning_rate(step: int, steps: int, warm_up: int, cosine: bool = True) -> float:
    """The learning rate of a step as a fraction of the peak, with mmcv's linear warm-up.

    It is below a line that falls to zero over all steps: mmcv's `poly` of power 1. With `cosine`, which is PyTorch's
    one-cycle, it leaves this line after the warm-up.
    """
    line = 1 - step / steps
    if step < warm_up:
        return (1 - (1 - step / warm_up) * (1 - _FIRST_RATE)) * line
    return 0.5 * (1 + math.cos(math.pi * (step + 1) / steps)) if cosine else line


def _drawn(backbone: Backbone, part: Segmented, settings: Settings, seed: int, number: int) -> tuple[Tensor, Tensor]:
    """The `number`-th crop of the training, counted over all steps, normalized (C, crop, crop), and its mask."""
    epoch, place = divmod(number, len(part.pairs))
    pair = part.pairs[int(stream(seed, epoch, 0, Purpose.ORDER).permutation(len(part.pairs))[place])]
    random, seen, rule = stream(seed, epoch, place, Purpose.VIEWS), backbone.preprocessing, settings.followed
    photo, mask = seen.reading.levels(pair[0]), torch.from_numpy(part.mask(pair))
    photo = _resized(photo, int(settings.short * random.uniform(*rule.scales)))
    mask = nearest(mask, (photo.shape[0], photo.shape[1]))
    left, top, width, height = varied_box(mask, rule.crop, random)
    pixels = torch.from_numpy(photo[top : top + height, left : left + width].astype(np.float32)).permute(2, 0, 1)
    mask = mask[top : top + height, left : left + width]
    if random.random() < 0.5:
        pixels, mask = pixels.flip(2), mask.flip(1)
    pixels = normalized(distorted(pixels, random).permute(1, 2, 0).numpy(), seen.mean, seen.std)
    beyond = (0, rule.crop - width, 0, rule.crop - height)
    return F.pad(pixels, beyond), F.pad(mask, beyond, value=VOID)


def _resized(photo: NDArray[np.generic], side: int) -> NDArray[np.generic]:
    """A photo (H, W, C) whose shorter side has so many pixels; fewer where the other one would be very long."""
    height, width = photo.shape[:2]
    scale = min(side / min(height, width), MOST_OBLONG * side / max(height, width))
    new = (max(int(width * scale + 0.5), 1), max(int(height * scale + 0.5), 1))
    return resized(photo, lambda whole: whole.resize(new, Image.Resampling.BILINEAR))


def _features(
    backbone: Backbone, loaded: Sequence[tuple[Tensor, Tensor]], settings: Settings
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """The features of a step's crops, their masks, and the parts of the features that the masks cover."""
    pixels, masks = (torch.stack(part) for part in zip(*loaded, strict=True))
    features, shares = _covered(backbone, pixels, settings.followed.levels)
    return features.float() if world()[1] == 1 else features.float().cpu(), masks, shares


def _covered(backbone: Backbone, pixels: Tensor, levels: Sequence[int]) -> tuple[Tensor, tuple[float, float]]:
    """The features of padded images, and the parts of their height and width that are not padding."""
    wide = backbone.padded(pixels)
    shares = (pixels.shape[2] / wide.shape[2], pixels.shape[3] / wide.shape[3])
    return backbone.joined(wide, levels), shares


# ---- test ------------------------------------------------------------------------------------------------------------


def tested(backbone: Backbone, head: nn.Module, data: Path, part: Segmented, settings: Settings, kept: Path) -> Tensor:
    """The confusion matrix (K, K) of all pixels, at the masks' own size. All processes must call it.

    Args:
        kept: as in `each_readable`.
    """
    seen, classes, rule = backbone.preprocessing, len(part.classes), settings.followed

    def load(pair: Pair) -> tuple[list[NDArray[np.generic]], Tensor]:
        photo = seen.reading.levels(pair[0])
        sizes = [_resized(photo, int(settings.short * ratio)) for ratio in rule.ratios]
        return sizes, torch.from_numpy(part.mask(pair))

    def logits(windows: Tensor) -> Tensor:
        features, shares = _covered(backbone, windows, rule.levels)
        return upsampled(head(features.float()), (windows.shape[2], windows.shape[3]), shares)

    def at_its_size(pixels: Tensor) -> Tensor:
        return slid(pixels, logits, rule.crop, settings.apart)

    def work(loaded: list[tuple[list[NDArray[np.generic]], Tensor]]) -> Tensor:
        matrix = torch.zeros(classes, classes, dtype=torch.int64)
        for photos, mask in loaded:
            views = (normalized(photo, seen.mean, seen.std) for photo in photos)
            size = (mask.shape[0], mask.shape[1])
            if len(photos) == 1:
                found = classes_at(at_its_size(next(views)), size)
            else:
                found = probabilities(views, at_its_size, size).argmax(0).cpu()
            matrix += confusion(found, mask, classes)
        return matrix

    matrices, _, _ = each_readable(part.pairs, load, work, settings.batch, data, kept)
    return torch.stack(matrices).sum(0)


def probabilities(views: Iterable[Tensor], logits: Callable[[Tensor], Tensor], size: tuple[int, int]) -> Tensor:
    """The sum of the classes' probabilities by all views of an image and their mirror images: (K, H, W).

    Args:
        views: the image at several sizes, each (C, H', W').
        logits: of a view, at any size.
    """

    def by_both(view: Tensor) -> Tensor:
        mirrored = upsampled(logits(view.flip(2)), size).softmax(0).flip(2)
        return upsampled(logits(view), size).softmax(0) + mirrored

    return reduce(torch.add, map(by_both, views))


def slid(pixels: Tensor, logits: Callable[[Tensor], Tensor], crop: int, stride: int) -> Tensor:
    """The mean of the logits of all windows that cover a pixel: (C, H, W) -> (K, H, W).

    Args:
        logits: of windows, (B, C, h, w) -> (B, K, h, w).
    """
    height, width = pixels.shape[1:]
    rows, columns = starts(height, crop, stride), starts(width, crop, stride)
    total: Tensor | None = None
    counts = torch.zeros(height, width)
    for top in rows:
        row = torch.stack([pixels[:, top : top + crop, left : left + crop] for left in columns])
        for left, one in zip(columns, logits(row), strict=True):
            total = one.new_zeros(len(one), height, width) if total is None else total
            total[:, top : top + crop, left : left + crop] += one
            counts[top : top + crop, left : left + crop] += 1
    assert total is not None
    return total / counts.to(total.device)


def starts(side: int, crop: int, stride: int) -> list[int]:
    """Where the windows along a side begin; the last one ends with it."""
    return [min(number * stride, max(side - crop, 0)) for number in range(max(-(-(side - crop) // stride), 0) + 1)]
