"""The input formats of segmentation, each a section `images` of its settings; `crops` produces them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class RandomCrops:
    crop: int = 513
    """Side of the training crops in pixels; test images keep their size."""
    scale: tuple[float, float] = (0.5, 2.0)
    """A training image is resized by a random factor between these before it is cropped."""

    def __post_init__(self) -> None:
        require_side(self.crop, "crop")
        require_range(self.scale)


@dataclass(frozen=True)
class SteppedCrops:
    """Crops as in Revisiting for Cityscapes: no image is smaller than its crop."""

    crop: int = 768
    """Side of the training crops in pixels; test images keep their size."""
    scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
    """A training image is resized (bicubic) by one of these factors, and enlarged if then smaller than its crop."""

    def __post_init__(self) -> None:
        require_side(self.crop, "crop")
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"images.scales={list(self.scales)}: must be one or more factors above 0")


@dataclass(frozen=True)
class SquashedImages:
    """Input as in Revisiting for VOC: whole images, all resized to squares."""

    side: int = 512
    """Side in pixels that every image is resized to (bicubic), without keeping its aspect ratio; the predicted classes
    of a test image are resized back to its size (nearest)."""
    rotation: float = 5.0
    """A training image is rotated about its center by at most this many degrees before it is resized."""
    scale: tuple[float, float] = (0.75, 1.25)
    """A training image is scaled within its frame by a random factor between these; areas from outside the image are
    black and count as the first class, in VOC the background."""

    def __post_init__(self) -> None:
        require_side(self.side, "side")
        require_range(self.scale)
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"images.rotation={self.rotation:g}: must be from 0 to 180 degrees")


SegmentationImages: TypeAlias = RandomCrops | SteppedCrops | SquashedImages


def require_side(side: int, key: str) -> None:
    if side < 32:
        raise ValueError(f"images.{key}={side}: must be at least 32 pixels")


def require_range(scale: tuple[float, float], key: str = "scale") -> None:
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"images.{key}={list(scale)}: must be a lower and an upper factor above 0")
