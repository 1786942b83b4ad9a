"""AutoAugment's policy for ImageNet (Cubuk et al. 2019, arXiv:1805.09501, table 9), carried out by Pillow.

It belongs to the worker's stage: its operations are defined on 8-bit images, and a library has them. Magnitudes are those
of torchvision.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
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
    crop: NDArray[np.uint8], policy: int, applied: NDArray[np.bool_], negative: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Carries out a sub-policy on a crop.

    Args:
        crop: uint8 (S, S, 3).
        policy: its place in POLICY.
        applied: whether each of the two operations is carried out.
        negative: whether with its magnitude's sign turned, where it has one.

    Returns:
        uint8 (S, S, 3), another array.
    """
    image = Image.fromarray(crop)
    for (name, _, magnitude), does, turned in zip(POLICY[policy], applied, negative, strict=True):
        if does:
            image = OPERATIONS[name](image, magnitude / 9, -1 if turned else 1)
    return np.asarray(image)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[[Image.Image, float, int], Image.Image]:
    return lambda image, strength, sign: kind(image).enhance(1 + sign * 0.9 * strength)


OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "posterize": lambda image, strength, _: ImageOps.posterize(image, 8 - round(4 * strength)),
    "rotate": lambda image, strength, sign: image.rotate(sign * 30 * strength),
    "solarize": lambda image, strength, _: ImageOps.solarize(image, math.ceil(255 - round(255 * strength, 6))),
    "autocontrast": lambda image, *_: ImageOps.autocontrast(image),
    "equalize": lambda image, *_: ImageOps.equalize(image),
    "invert": lambda image, *_: ImageOps.invert(image),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, strength, sign: image.transform(
        image.size, Image.Transform.AFFINE, (1, sign * 0.3 * strength, 0, 0, 1, 0)
    ),
}
"""From an image, a strength from 0 to 1 and a sign. Corners that a rotation or shear opens are black."""
