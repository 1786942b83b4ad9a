"""From a photo and its annotations to tensors: reading, checking, flipping.

Every random choice is a function of (seed, epoch, index of the image), so that neither workers nor a restart change it.
Detection images are resized in the network (GeneralizedRCNNTransform) or in `jitter`, segmentation images in `crops`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clove_hub.check import Images, with_boxes, with_masks
from clove_hub.data.coco import Photo, compressed
from clove_hub.data.images import BrokenImage, read_image
from clove_hub.data.masks import Segmented
from clove_hub.views import Purpose, stream

from ..run.sampler import taken
from ..sources.source import shuffled
from .crops import for_testing, for_training
from .forms import SegmentationImages
from .jitter import Jitter, jittered

Target = dict[str, Tensor]


class Sample(NamedTuple):
    image: Tensor  # (3, H, W) uint8, RGB
    target: Target


@dataclass(frozen=True)
class DetectionDataset:
    """Photos with boxes, and masks or keypoints if the photos have them.

    An item is (epoch, index); with a seed, half of the images are flipped, without one, none.
    """

    photos: Sequence[Photo]
    seed: int | None = None
    partners: tuple[int, ...] = ()
    """For each keypoint, its counterpart after flipping: left eye, right eye."""
    jitter: Jitter | None = None
    """Large-scale jitter of training images."""

    def __len__(self) -> int:
        return len(self.photos)

    @property
    def kinds(self) -> list[int]:
        """Portrait or landscape: a step's images are padded to one size, so they are of one kind."""
        if self.jitter:
            return [0] * len(self)
        return [int(photo.height > photo.width) for photo in self.photos]

    @property
    def checkable(self) -> Images:
        """The images to check before the first step."""
        return with_boxes(self.photos)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, index = item
        photo = self.photos[index]
        image = read_pixels(photo.path, (photo.height, photo.width))
        target = target_of(photo)
        if self.seed is not None:
            draws = stream(self.seed, epoch, index, Purpose.VIEWS).random(4)
            if draws[0] < 0.5:
                image, target = image.flip(-1), mirrored(target, photo.width, self.partners)
            if self.jitter:
                image, target = jittered(image, target, self.jitter, draws[1:])
        return Sample(image, target)


@dataclass(frozen=True)
class SegmentationDataset:
    """Images with a class for every pixel. An item is (epoch, index); with a seed it is a random view."""

    part: Segmented
    images: SegmentationImages
    color: tuple[int, int, int]
    """Color outside an image in a random crop."""
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.part.pairs)

    @property
    def kinds(self) -> list[int]:
        """All views have one size."""
        return [0] * len(self)

    @property
    def checkable(self) -> Images:
        """The images to check before the first step."""
        return with_masks(self.part)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, index = item
        pair = self.part.pairs[index]
        image = read_pixels(pair[0])
        label = torch.from_numpy(self.part.mask(pair, (image.shape[2], image.shape[1])))
        if self.seed is not None:
            draws = stream(self.seed, epoch, index, Purpose.VIEWS).random(4)
            image, label = for_training(image, label, self.images, draws, self.color)
        else:
            image = for_testing(image, self.images)
        return Sample(image, {"classes": label})


@dataclass(frozen=True)
class OrderByKind:
    """Images as (epoch, index), epoch after epoch; those of one step are of one kind.

    Images of a kind are held back until they fill a batch, also across epochs. So no image is left out, and if all are
    of one kind the order is that of the epochs. With whole epochs, incomplete batches are dropped.
    """

    kinds: Sequence[int]  # of each image
    batch: int  # images of a step, over all processes
    seed: int
    whole_epochs: bool = False

    def batches(self, begins: Iterable[int], count: int) -> Iterator[list[tuple[int, int]]]:
        return taken(itertools.chain.from_iterable(self._steps()), begins, count)

    def _steps(self) -> Iterator[list[tuple[int, int]]]:
        waiting: dict[int, list[tuple[int, int]]] = {kind: [] for kind in self.kinds}
        for epoch in itertools.count():
            if self.whole_epochs:
                waiting = {kind: [] for kind in self.kinds}
            for index in shuffled(self.seed, epoch, len(self.kinds)).tolist():
                together = waiting[self.kinds[index]]
                together.append((epoch, index))
                if len(together) == self.batch:
                    yield together.copy()
                    together.clear()


# ---- pieces ----------------------------------------------------------------------------------------------------------


def read_pixels(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """Read an image, rotated according to its EXIF orientation: (3, H, W) uint8.

    Raises:
        ValueError: it cannot be read, or its size differs from that of the annotations.
    """
    try:
        image = read_image(path)
    except BrokenImage as error:  # as an error that can be pickled by a loading worker
        raise ValueError(f"the image {error}") from error
    if size is not None and image.shape[:2] != size:
        raise ValueError(
            f"the image {path} has {image.shape[1]} x {image.shape[0]} pixels, its annotations are for {size[1]} x "
            f"{size[0]}"
        )
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()


def target_of(photo: Photo) -> Target:
    """The training target of torchvision's detectors: boxes (N, 4), labels (N,), masks (N, H, W), keypoints (N, K, 3).

    COCO gives a keypoint as a pixel index; here it is that pixel's center, offset by half a pixel, in the coordinates
    of boxes and flips.
    """
    target = {"boxes": torch.from_numpy(photo.boxes.copy()), "labels": torch.from_numpy(photo.labels.copy())}
    if photo.segmentations:
        from pycocotools import mask

        masks = [mask.decode(compressed(one, photo.height, photo.width)) for one in photo.segmentations]
        target["masks"] = torch.from_numpy(np.stack(masks))
    if photo.keypoints is not None:
        points = torch.from_numpy(photo.keypoints.copy())
        points[..., :2] += 0.5
        target["keypoints"] = points
    return target


def mirrored(target: Target, width: int, partners: Sequence[int]) -> Target:
    """The target of the horizontally flipped image."""
    flipped = dict(target)
    x0, y0, x1, y1 = target["boxes"].unbind(-1)
    flipped["boxes"] = torch.stack([width - x1, y0, width - x0, y1], -1)
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(-1)
    if "keypoints" in target:
        points = target["keypoints"][:, list(partners)].clone()
        points[..., 0] = width - points[..., 0]
        points[points[..., 2] == 0] = 0.0  # absent keypoints have no position
        flipped["keypoints"] = points
    return flipped


def mirror_partners(names: Sequence[str]) -> tuple[int, ...]:
    """For each keypoint, the index of its counterpart: the same name with left and right exchanged."""
    others = [name.replace("left", "\0").replace("right", "left").replace("\0", "right") for name in names]
    return tuple(names.index(other) if other in names else place for place, other in enumerate(others))
