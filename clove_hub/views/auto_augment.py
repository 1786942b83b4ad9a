"""AutoAugment's policy for ImageNet (Cubuk et al. 2019, arXiv:1805.09501, table 9), carried out by Pillow.

It belongs to the worker's stage: its operations are defined on 8-bit images, and a library has them. They are those of the
released MoCo-kNN code bit for bit; torchvision today shears about a corner and solarizes from one level lower on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

POLICY = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
    (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 0)),
    (("color", 0.4, 0), ("equalize", 0.6, 0)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
)
"""25 sub-policies of two operations, each with its probability and its magnitude from 0 to 9."""

CHANCES = np.array([[chance for _, chance, _ in pair] for pair in POLICY])  # (25, 2)


def auto_augment(
    image: Image.Image, policy: int, applied: NDArray[np.bool_], negative: NDArray[np.bool_]
) -> Image.Image:
    """Carries out a sub-policy on a square picture of mode RGB.

    Args:
        policy: its place in POLICY.
        applied: whether each of the two operations is carried out.
        negative: whether with its magnitude's sign turned, where it has one.
    """
    for (name, _, level), does, turned in zip(POLICY[policy], applied, negative, strict=True):
        if does:
            image = OPERATIONS[name](image, level, -1 if turned else 1)
    return image


def _magnitudes(most: float, least: float = 0.0) -> list[float]:
    """Of the levels 0 to 9. In float32, as in the released code: the last bit decides how some pixels are rounded."""
    levels: list[float] = torch.linspace(least, most, 10).tolist()
    return levels


_BLEND, _DEGREES, _SHEAR, _SOLARIZE = _magnitudes(0.9), _magnitudes(30.0), _magnitudes(0.3), _magnitudes(0.0, 256.0)
_BITS = (8, 8, 7, 7, 6, 6, 5, 5, 4, 4)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[[Image.Image, int, int], Image.Image]:
    return lambda image, level, sign: kind(image).enhance(1 + sign * _BLEND[level])


def _shear(image: Image.Image, level: int, sign: int) -> Image.Image:
    """Along the rows, about the center."""
    slope = sign * math.tan(_SHEAR[level])
    return image.transform(image.size, Image.Transform.AFFINE, (1, slope, -slope * image.height / 2, 0, 1, 0))


OPERATIONS: dict[str, Callable[[Image.Image, int, int], Image.Image]] = {
    "posterize": lambda image, level, _: ImageOps.posterize(image, _BITS[level]),
    "rotate": lambda image, level, sign: image.rotate(sign * _DEGREES[level]),
    "solarize": lambda image, level, _: ImageOps.solarize(image, _SOLARIZE[level]),  # type: ignore[arg-type]
    "autocontrast": lambda image, *_: ImageOps.autocontrast(image),
    "equalize": lambda image, *_: ImageOps.equalize(image),
    "invert": lambda image, *_: ImageOps.invert(image),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _shear,
}
"""From an image, a level from 0 to 9 and a sign. Corners that a rotation or shear opens are black."""
