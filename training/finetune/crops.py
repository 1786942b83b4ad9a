"""Training and test views for segmentation: images and their masks, resized, rotated and cropped together.

Pure functions of uniform random numbers; images are (3, H, W) and masks (H, W), both uint8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clove_hub.data.masks import VOID

from .forms import RandomCrops, SegmentationImages, SquashedImages, SteppedCrops

Draws = NDArray[np.float64]
"""Four uniform numbers, of which an input format uses those that it needs."""
Color = tuple[int, int, int]


def for_training(image: Tensor, mask: Tensor, images: SegmentationImages, draws: Draws, color: Color) -> list[Tensor]:
    """A random view of an image and its mask; the size of all views is the same.

    Args:
        color: color outside the image in a random crop.
    """
    if isinstance(images, SquashedImages):
        return squashed(image, mask, images, draws)
    if isinstance(images, SteppedCrops):
        return stepped_crop(image, mask, images, draws)
    return random_crop(image, mask, images, draws, color)


def for_testing(image: Tensor, images: SegmentationImages) -> Tensor:
    """The image as input of the network; its mask keeps its own size."""
    return bicubic(image, (images.side, images.side)) if isinstance(images, SquashedImages) else image


# ---- the input formats -----------------------------------------------------------------------------------------------


def random_crop(image: Tensor, mask: Tensor, images: RandomCrops, draws: Draws, color: Color) -> list[Tensor]:
    """Resize by a random factor, crop a square and flip half of them; pixels outside the image do not count.

    Args:
        draws: uniform numbers for factor, row, column, flip.
        color: color of the pixels outside the image.
    """
    low, high = images.scale
    factor = low + (high - low) * draws[0]
    size = [max(round(side * factor), 1) for side in mask.shape]
    pixels = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    pixels = pixels.round_().clamp_(0, 255).to(torch.uint8)
    classes = F.interpolate(mask[None, None], size, mode="nearest-exact")[0, 0]
    found = flipped(cut(pixels, classes, images.crop, draws[1:3]), draws[3])
    beyond = [torch.tensor(color, dtype=torch.uint8).view(3, 1, 1), torch.tensor(VOID, dtype=torch.uint8)]
    height, width = found[1].shape
    whole = [value.expand(*value.shape[:-2], images.crop, images.crop).clone() for value in beyond]
    for out, part in zip(whole, found, strict=True):
        out[..., :height, :width] = part
    return whole


def stepped_crop(image: Tensor, mask: Tensor, images: SteppedCrops, draws: Draws) -> list[Tensor]:
    """Resize by one of several factors, enlarge images smaller than the crop, crop a square, flip half of them.

    Args:
        draws: uniform numbers for factor, row, column, flip.
    """
    factor = images.scales[int(draws[0] * len(images.scales))]
    height, width = (max(int(side * factor), 1) for side in mask.shape)
    pixels, classes = bicubic(image, (height, width)), nearest(mask, (height, width))
    if min(height, width) < images.crop:  # a second interpolation of the resized image, as in the release
        factor = images.crop / min(height, width)
        size = int(factor * height + 1), int(factor * width + 1)
        pixels, classes = bicubic(pixels, size), nearest(classes, size)
    return flipped(cut(pixels, classes, images.crop, draws[1:3], spare=0), draws[3])


def squashed(image: Tensor, mask: Tensor, images: SquashedImages, draws: Draws) -> list[Tensor]:
    """Flip half of the images, rotate and scale about the center, resize to a square whatever the aspect ratio.

    Args:
        draws: uniform numbers for flip, angle, factor.
    """
    image, mask = flipped([image, mask], draws[0])
    angle = math.radians(images.rotation * (2 * draws[1] - 1))
    low, high = images.scale
    factor = low + (high - low) * draws[2]
    height, width = mask.shape
    # The source position of each output pixel, around (W / 2, H / 2) as in the release's OpenCV call.
    down = (torch.arange(height, dtype=torch.float64) - height / 2).view(-1, 1)
    right = torch.arange(width, dtype=torch.float64) - width / 2
    x = (math.cos(angle) * right - math.sin(angle) * down) / factor + width / 2
    y = (math.sin(angle) * right + math.cos(angle) * down) / factor + height / 2
    grid = torch.stack([2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1], -1)[None].float()
    # Pixels outside the image are 0: black, and of the first class.
    pixels = F.grid_sample(image[None].float(), grid, "bicubic", align_corners=True)[0]
    classes = F.grid_sample(mask[None, None].float(), grid, "nearest", align_corners=True)[0, 0]
    square = images.side, images.side
    return [bicubic(to_bytes(pixels), square), nearest(classes.to(torch.uint8), square)]


# ---- pieces ----------------------------------------------------------------------------------------------------------


def cut(image: Tensor, mask: Tensor, side: int, draws: Draws, spare: int = 1) -> list[Tensor]:
    """Crop a square of both, or less if they are smaller.

    Args:
        draws: uniform numbers for row and column.
        spare: added to the number of positions that a draw chooses from; with 0 the last is never chosen.
    """
    top, left = (int(draw * (max(length - side, 0) + spare)) for length, draw in zip(mask.shape, draws, strict=True))
    return [one[..., top : top + side, left : left + side] for one in (image, mask)]


def flipped(both: list[Tensor], draw: float) -> list[Tensor]:
    """Flip horizontally for a draw below 0.5."""
    return [one.flip(-1) for one in both] if draw < 0.5 else both


def bicubic(image: Tensor, size: Sequence[int]) -> Tensor:
    """Resize without antialiasing, as OpenCV's INTER_CUBIC: (3, H, W) uint8 -> (3, h, w) uint8."""
    return to_bytes(F.interpolate(image[None].float(), tuple(size), mode="bicubic")[0])


def nearest(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Resize as OpenCV's INTER_NEAREST: (H, W) -> (h, w)."""
    rows, columns = (
        torch.arange(new, device=mask.device) * old // new for new, old in zip(size, mask.shape, strict=True)
    )
    return mask[rows][:, columns]


def to_bytes(pixels: Tensor) -> Tensor:
    return pixels.round().clamp(0, 255).to(torch.uint8)
