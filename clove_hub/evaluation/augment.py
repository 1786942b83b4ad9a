"""Random augmentation of photos and masks for protocols that train on crops: torchvision's and MMSegmentation's steps.

Photos are float32 (C, H, W) in units of which 255 are white, masks uint8 (H, W). Colors are changed in floating point,
while the originals round to integers after each step. Images with other than three bands keep their values.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from clove_hub.data.masks import VOID
from clove_hub.views.color import blend_, turn_hue_

Box = tuple[int, int, int, int]
"""Left, top, width, height."""


def jittered(photo: Tensor, strength: float, random: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue, in this order, each with probability 1/2; factors of 1 +- strength."""
    factors = random.uniform(1 - strength, 1 + strength, 3).astype(np.float32)
    turn = random.uniform(-strength, strength)
    done = random.random(4) < 0.5
    one = torch.ones(1, 1, 1, 1)
    steps: list[Callable[[Tensor], None]] = [
        lambda x: blend_(x, one * factors[0], None, None, False),
        lambda x: blend_(x, one * factors[1], None, one, False),
        lambda x: blend_(x, one * factors[2], one, None, False),
        lambda x: turn_hue_(x, torch.full((1, 1, 1), turn), False),
    ]
    return _changed(photo, [step for step, wanted in zip(steps, done, strict=True) if wanted])


def distorted(photo: Tensor, random: np.random.Generator) -> Tensor:
    """MMSegmentation's photometric distortion as in DINOv3: any hue, and contrast about black.

    Brightness +-32 levels, contrast and saturation 0.5 to 1.5, hue +-1/2 of the circle, each with probability 1/2; contrast
    comes second or last.
    """
    added = float(random.uniform(-32, 32))
    contrast, saturation = (float(factor) for factor in random.uniform(0.5, 1.5, 2))
    turn = float(random.uniform(-0.5, 0.5))
    done = random.random(5) < 0.5
    one = torch.ones(1, 1, 1, 1)
    steps: list[Callable[[Tensor], object]] = [
        lambda x: x.add_(added).clamp_(0, 255),
        lambda x: blend_(x, one * saturation, one, None, False),
        lambda x: turn_hue_(x, torch.full((1, 1, 1), turn), False),
    ]
    wanted = [step for step, yes in zip(steps, done, strict=False) if yes]
    if done[3]:
        wanted.insert(int(done[0]) if done[4] else len(wanted), lambda x: x.mul_(contrast).clamp_(0, 255))
    return _changed(photo, wanted)


def _changed(photo: Tensor, steps: list[Callable[[Tensor], object]] | list[Callable[[Tensor], None]]) -> Tensor:
    if len(photo) != 3:
        return photo
    batch = photo[None].clone()
    for step in steps:
        step(batch)
    return batch[0]


def random_box(width: int, height: int, scale: tuple[float, float], random: np.random.Generator) -> Box:
    """The crop of torchvision's RandomResizedCrop with its ratios, 3/4 to 4/3; the middle where ten draws do not fit.

    Args:
        scale: of the area, as parts of the image's; from 1 on no draw fits.
    """
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(width - w + 1)), int(random.integers(height - h + 1)), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def varied_box(mask: Tensor, side: int, random: np.random.Generator) -> Box:
    """A crop of at most `side` pixels a side; up to ten times another one while one class has 3/4 of what has a class."""
    height, width = mask.shape
    w, h = min(side, width), min(side, height)
    for number in range(11):
        left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
        counts = torch.bincount(mask[top : top + h, left : left + w].flatten(), minlength=VOID)[:VOID]
        if number == 10 or (int((counts > 0).sum()) > 1 and int(counts.max()) < 0.75 * int(counts.sum())):
            break
    return left, top, w, h
