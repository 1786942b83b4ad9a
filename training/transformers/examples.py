"""From photos and annotations to the inputs of transformers' models; the image processor computes the pixels.

Every random choice is a function of (seed, epoch, index of the image), so that neither workers nor a restart change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clove_hub.data.masks import VOID
from clove_hub.views import Purpose, stream

from ..finetune.crops import random_crop
from ..finetune.dataset import DetectionDataset, Sample, SegmentationDataset, read_pixels
from ..finetune.forms import RandomCrops
from .settings import STRIDE, ModelImages, ModelSettings

Batch = dict[str, Any]
"""The arguments of a model's `forward`."""


@dataclass(frozen=True)
class DetectorBatches:
    """Batches of photos and boxes. Images of one batch are resized alike; padded ones have a mask of the image area."""

    photos: DetectionDataset
    images: ModelImages
    processor: Any

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> Batch:
        samples = [self.photos[item] for item in items]
        epoch, index = items[0]
        assert self.photos.seed is not None
        draw = stream(self.photos.seed, epoch, index, Purpose.VIEWS).random(2)[1]  # the first number decides the flip
        pixels = prepared(self.processor, [sample.image for sample in samples], size=size_of(self.images, draw))
        return {**pixels, "labels": [boxes_of(sample) for sample in samples]}


@dataclass(frozen=True)
class SegmenterBatches:
    """Batches of square random crops, resized before cropping."""

    photos: SegmentationDataset
    images: ModelImages
    processor: Any
    by_masks: bool
    """Whether the model's target is a mask for each class in an image; otherwise the class of each pixel."""

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> Batch:
        views = [self._view(*item) for item in items]
        pixels = prepared(self.processor, [image for image, _ in views], do_resize=False)
        if self.by_masks:
            present = [
                [number for number in mask.flatten().bincount().nonzero().flatten().tolist() if number != VOID]
                for _, mask in views
            ]
            masks = [
                torch.stack([mask == number for number in numbers]).float() if numbers else torch.zeros(0, *mask.shape)
                for numbers, (_, mask) in zip(present, views, strict=True)
            ]
            classes = [torch.tensor(numbers, dtype=torch.int64) for numbers in present]
            return {**pixels, "mask_labels": masks, "class_labels": classes}
        return {**pixels, "labels": torch.stack([mask for _, mask in views]).long()}

    def _view(self, epoch: int, index: int) -> list[Tensor]:
        pair, seed = self.photos.part.pairs[index], self.photos.seed
        assert seed is not None
        image = read_pixels(pair[0])
        height, width = image.shape[1:]
        mask = torch.from_numpy(self.photos.part.mask(pair, (width, height)))
        usual = factor_of(self.images, height, width)
        crops = RandomCrops(self.images.size, (usual * self.images.scale[0], usual * self.images.scale[1]))
        return random_crop(image, mask, crops, stream(seed, epoch, index, Purpose.VIEWS).random(4), self.photos.color)


def batches_of(photos: Any, settings: ModelSettings, processor: Any) -> DetectorBatches | SegmenterBatches:
    if isinstance(photos, SegmentationDataset):
        return SegmenterBatches(photos, settings.images, processor, settings.model == "mask2former")
    return DetectorBatches(photos, settings.images, processor)


# ---- pieces ----------------------------------------------------------------------------------------------------------


def prepared(processor: Any, images: Sequence[Tensor], **changes: Any) -> Batch:
    """The image processor's output for images (3, H, W) uint8: `pixel_values` (B, 3, h, w), `pixel_mask` (B, h, w)."""
    return dict(processor(list(images), return_tensors="pt", input_data_format="channels_first", **changes))


def size_of(images: ModelImages, draw: float | None = None) -> dict[str, int]:
    """The size argument of an image processor.

    Args:
        draw: a uniform number for a random size; None for the size in tests.
    """
    side, factor = images.size, 1.0
    if draw is not None:
        low, high = images.scale
        side = max(round(images.size * (low + (high - low) * draw) / STRIDE), 1) * STRIDE
        factor = side / images.size
    if images.longest_edge is None:
        return {"height": side, "width": side}
    return {"shortest_edge": side, "longest_edge": round(images.longest_edge * factor)}


def factor_of(images: ModelImages, height: int, width: int) -> float:
    """The resizing factor of an image in tests."""
    assert images.longest_edge is not None
    return min(images.size / min(height, width), images.longest_edge / max(height, width))


def boxes_of(sample: Sample) -> dict[str, Tensor]:
    """Classes from 0, and boxes as center and size in fractions of the image, which resizing does not change.

    Not in fractions of a padded image, as from the image processors of transformers: predictions are multiplied by the
    size of the image without padding.
    """
    height, width = sample.image.shape[1:]
    x0, y0, x1, y1 = sample.target["boxes"].unbind(-1)
    boxes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], -1)
    return {
        "class_labels": sample.target["labels"] - 1,
        "boxes": boxes / torch.tensor([width, height, width, height], dtype=boxes.dtype),
    }
