"""A linear layer on frozen feature maps predicts the class of each pixel.

The features are computed once and kept on disk. Each level is standardized channel by channel and has its own linear
layer (a 1x1 convolution); the sum of their logits, resized to one size bilinearly, equals a single layer on the
concatenated, upsampled levels, at a fraction of the work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from clove_hub.data.files import described
from clove_hub.data.masks import VOID, Pair, Segmented, open_segmented
from clove_hub.geometry import upsampled

from ..weights.backbone import PAD, Backbone
from .kept import Kept, Maps, features_key, kept_maps, own_folder
from .processes import gather, share
from .progress import tracked
from .reading import batches, in_threads, normalized, resized
from .result import Outcome, mean_items
from .scores import absent_classes, class_scores, confusion, mean_and_deviation, segmentation_scores
from .unfinished import Training, once, state_in

VERSION = 2
RULE = "own"
RANDOMNESS = "the probe"
PREPROCESSING = ("mean", "std")


@dataclass(frozen=True)
class Settings:
    levels: tuple[int, ...] = (-1,)
    """Feature levels: -1 is the last (layer4 of a ResNet), -2 the one before."""
    height: int = 360
    """All images are resized to this height ..."""
    width: int = 480
    """... and this width for the backbone; scores are measured at the masks' own size."""
    stride: int = 4
    """In training, the loss uses one pixel of each stride x stride square."""
    epochs: int = 30
    """Passes over the training images."""
    learning_rate: float = 0.01
    """Initial learning rate of Adam; it falls to zero along a cosine."""
    weight_decay: float = 1e-4
    """Weight decay of Adam."""
    seeds: int = 3
    """Number of trainings, with the given seed and the following ones."""
    train: str = "train"
    """Name of the training split."""
    test: str = "test"
    """Name of the test split."""
    train_images: int | None = None
    """At most this many, spread evenly over the list; null for all."""
    test_images: int | None = None
    """Like `train_images`, for the test split."""
    batch: int = 16
    """Images in a training step."""

    def __post_init__(self) -> None:
        counts = (self.height, self.width, self.stride, self.epochs, self.seeds, self.batch, len(self.levels))
        limits = [limit for limit in (self.train_images, self.test_images) if limit is not None]
        if min(*counts, *limits) < 1 or self.learning_rate <= 0 or self.weight_decay < 0:
            raise ValueError(f"{self}: all but weight_decay must be positive, with at least one level")


def evaluate(backbone: Backbone, data: Path, settings: Settings, seed: int) -> Outcome:
    """`mIoU` and `pixel accuracy` of the test images, means over the seeds.

    Args:
        data: images with a mask each, in one of the layouts of `open_segmented`.
    """
    train = open_segmented(data, settings.train).spread(settings.train_images)
    test = open_segmented(data, settings.test).spread(settings.test_images)
    classes = len(train.classes)
    grid = (math.ceil(settings.height / settings.stride), math.ceil(settings.width / settings.stride))
    seeds = list(range(seed, seed + settings.seeds))
    files = [path for pair in train.pairs + test.pairs for path in pair]
    with (
        own_folder(features_key(backbone, data, files, f"dense-probe {settings} {seed} {train} {test}")) as folder,
        frozen_features(backbone, data, train, settings) as learned,
        frozen_features(backbone, data, test, settings) as asked,
    ):
        train, test = train.of(learned.images), test.of(asked.images)
        targets = torch.stack([_thinned(train.mask(pair), grid) for pair in train.pairs])
        if not bool((targets < classes).any()):
            raise ValueError(f"the masks of {data} ({settings.train}) are all void ({VOID}): there is nothing to learn")

        def scored(number: int) -> Tensor:
            """The confusion matrix (K, K) of the test images by the layer of a seed."""
            where, kept = (backbone.device, backbone.multiple), folder / f"{number}.unfinished"
            probe = fit(learned.levels, targets, classes, settings, number, *where, kept)
            matrix = torch.zeros(classes, classes, dtype=torch.int64)
            masks = in_threads(lambda pair: torch.from_numpy(test.mask(pair)), batches(test.pairs, 1))
            for place, (mask,) in enumerate(tracked(masks, f"scoring, seed {number}", len(test.pairs))):
                maps = [level[place : place + 1] for level in asked.levels]
                matrix += confusion(probe.predict(maps, (mask.shape[0], mask.shape[1])), mask, classes)
            return matrix

        matrices = gather(once(folder / f"{number}.matrix", partial(scored, number)) for number in share(seeds))
    if not int(matrices[0].sum()):
        raise ValueError(f"the masks of {data} ({settings.test}) are all void ({VOID})")
    metrics, deviations = mean_and_deviation([segmentation_scores(matrix) for matrix in matrices])
    files = [path for pair in train.pairs + test.pairs for path in pair]
    return Outcome(
        metrics,
        described(data, files, len(test.pairs)),
        tuple(seeds),
        deviations,
        split=settings.test,
        items=mean_items([{"class": class_scores(matrix, train.classes)} for matrix in matrices]),
        absent=absent_classes(matrices[0], test.classes),
        left_out=learned.left_out + asked.left_out,
    )


# ---- training images -------------------------------------------------------------------------------------------------


def frozen_features(
    backbone: Backbone, data: Path, part: Segmented, settings: Settings
) -> AbstractContextManager[Kept]:
    """The maps of the images that can be read."""
    seen = backbone.preprocessing

    def load(pair: Pair) -> Tensor:
        image = seen.reading.levels(pair[0])
        part.mask(pair, (image.shape[1], image.shape[0]))  # a bad mask should raise before the long part
        size = (settings.width, settings.height)
        return normalized(
            resized(image, lambda whole: whole.resize(size, Image.Resampling.BICUBIC)), seen.mean, seen.std
        )

    photos, shown = [photo for photo, _ in part.pairs], f"{settings.height}x{settings.width}"
    return kept_maps(backbone, data, part.pairs, load, settings.levels, settings.batch, photos=photos, shown=shown)


def _thinned(mask: np.ndarray[tuple[int, int], np.dtype[np.uint8]], grid: tuple[int, int]) -> Tensor:
    """The mask at the centers of the cells of a grid: (H, W) -> (h, w)."""
    rows, columns = (
        ((np.arange(cells) + 0.5) * side / cells).astype(int) for cells, side in zip(grid, mask.shape, strict=True)
    )
    return torch.from_numpy(mask[rows][:, columns])


# ---- the layer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A trained layer."""

    weights: list[Tensor]
    """For each level (K, C)."""
    bias: Tensor
    """(K,)"""
    seen: tuple[int, int]
    """Height and width of the images, of which the maps cover the padded size."""
    multiple: int = PAD
    """To which they were padded."""

    def logits(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Maps of each level (B, C, h, w) -> (B, K, H, W), of the images brought to `size`."""
        height, width = (side / (side + -side % self.multiple) for side in self.seen)
        result = self.bias.view(-1, 1, 1)
        for level, weight in zip(maps, self.weights, strict=True):
            result = result + upsampled(torch.einsum("kc,bchw->bkhw", weight, level), size, (height, width))
        return result

    def predict(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Maps of one image -> the class of each of its pixels, (H, W) on the CPU."""
        return self.logits([level.to(self.bias.device) for level in maps], size)[0].argmax(0).cpu()


def fit(
    features: Sequence[Tensor | Maps],
    targets: Tensor,
    classes: int,
    settings: Settings,
    seed: int,
    device: torch.device,
    multiple: int = PAD,
    kept: Path | None = None,
) -> Probe:
    """Train the layer with Adam; the seed determines its initial weights and the order of the images.

    Standardization is folded into the weights afterwards, so that the probe takes features as they are.

    Args:
        features: for each level (N, C, h, w).
        targets: (N, H, W), classes and 255 for void.
        multiple: of the sides of the images that the features were made of.
        kept: where the state of the training is saved after an epoch, to resume from.
    """
    generator = torch.Generator().manual_seed(seed)
    moments = [channel_moments(level, settings.batch) for level in features]
    means = [mean.to(device) for mean, _ in moments]
    scales = [1 / deviation.clamp(min=1e-6).to(device) for _, deviation in moments]
    channels = sum(len(mean) for mean in means)
    weights = [torch.randn(classes, len(mean), generator=generator).to(device) / channels**0.5 for mean in means]
    bias = torch.zeros(classes, device=device)
    parameters = nn.ParameterList([*weights, bias])
    weights, bias = list(parameters[:-1]), parameters[-1]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    training, state = Training(parameters, optimizer, generator), state_in(kept)
    begun = training.restore(state) if state else 0
    each = math.ceil(len(targets) / settings.batch)
    steps, done = settings.epochs * each, begun * each
    seen = (settings.height, settings.width)
    for epoch in tracked(range(begun, settings.epochs), f"training, seed {seed}"):
        for batch in torch.split(torch.randperm(len(targets), generator=generator), settings.batch):
            truth = targets[batch].to(device).long()
            if not bool((truth < classes).any()):  # nothing but void: no loss and no gradient
                done += 1
                continue
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done / steps))
            with torch.enable_grad():
                probe = _folded(weights, bias, means, scales, seen, multiple)
                logits = probe.logits([level[batch].to(device) for level in features], (truth.shape[1], truth.shape[2]))
                # Pixels in one row: the loss over maps adds up in any order on an accelerator.
                loss = F.cross_entropy(logits.movedim(1, 3).flatten(0, 2), truth.flatten(), ignore_index=VOID)
                # The decay is part of the loss: Adam's own would depend on its learning rates.
                loss = loss + settings.weight_decay * torch.stack([w.square().sum() for w in weights]).sum()
                gradients = torch.autograd.grad(loss, list(parameters))
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            done += 1
        training.keep(kept, epoch + 1, epoch + 1 == settings.epochs)
    return _folded([w.detach() for w in weights], bias.detach(), means, scales, seen, multiple)


def channel_moments(maps: Tensor | Maps, batch: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, float32 (C,), of maps (N, C, h, w) of which `batch` are read at once."""
    parts = [slice(start, start + batch) for start in range(0, len(maps), batch)]
    cells = len(maps) * maps.shape[-2] * maps.shape[-1]
    mean = torch.stack([maps[part].double().sum((0, 2, 3)) for part in parts]).sum(0) / cells
    squares = [(maps[part].double() - mean.view(-1, 1, 1)).square().sum((0, 2, 3)) for part in parts]
    return mean.float(), (torch.stack(squares).sum(0) / cells).sqrt().float()


def _folded(
    weights: Sequence[Tensor],
    bias: Tensor,
    means: Sequence[Tensor],
    scales: Sequence[Tensor],
    seen: tuple[int, int],
    multiple: int,
) -> Probe:
    """w (x - mean) scale + b as one linear layer."""
    scaled = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
    shift = [weight @ mean for weight, mean in zip(scaled, means, strict=True)]
    return Probe(scaled, bias - torch.stack(shift).sum(0), seen, multiple)
