"""Gaussian blur as Pillow does it: three passes of an extended box filter whose border pixels are repeated.

A box of fractional radius r + a weighs the pixels up to r away by w and those r + 1 away by f (Gwosdek et
al., "Theoretical Foundations of Gaussian Convolution by Extended Box Filtering", SSVM 2011, Eqs. 7 and 11).
Along one axis it is the matrix w A + f B with constant A and B for each r, so three passes are

    (w A + f B)^3 = w^3 AAA + w^2 f (AAB + ABA + BAA) + w f^2 (ABB + BAB + BBA) + f^3 BBB,

four constant matrices with four weights for each sigma. The matrices are made once, in float64.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PASSES = 3
_BAND = 48  # lines; the fastest of 24 to 112, both for 96 and for 224 pixels


def box_bank(size: int, widest: float) -> Tensor:
    """The constant matrices for lines of `size` pixels and sigmas up to `widest`, float32 (4 R, size * size).

    Four consecutive rows belong to each whole radius 0, 1, ..., R - 1; `box_weights` weighs them.
    """
    lines = np.arange(size)

    def taps(distance: int) -> NDArray[np.float64]:
        """(size, size): which pixel lies `distance` after each one, the border repeated."""
        matrix = np.zeros((size, size))
        matrix[lines, np.clip(lines + distance, 0, size - 1)] = 1
        return matrix

    bank = []
    for radius in range(int(_box_radius(np.array([widest]))[0]) + 1):
        a = sum((taps(d) for d in range(-radius, radius + 1)), np.zeros((size, size)))
        b = taps(-radius - 1) + taps(radius + 1)
        bank += [a @ a @ a, a @ a @ b + a @ b @ a + b @ a @ a, a @ b @ b + b @ a @ b + b @ b @ a, b @ b @ b]
    return torch.from_numpy(np.stack(bank).reshape(len(bank), size * size)).float()


def box_weights(sigmas: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    """The weights (N, rows) that make the blur of each sigma out of a bank of `rows` matrices."""
    radius = _box_radius(sigmas.astype(np.float64))
    whole = np.floor(radius).astype(np.int64)
    inner = 1 / (2 * radius + 1)
    outer = (1 - (2 * whole + 1) * inner) / 2
    weights = np.zeros((len(sigmas), rows // 4, 4), dtype=np.float32)
    terms = np.stack([inner**3, inner**2 * outer, inner * outer**2, outer**3], axis=1)
    weights[np.arange(len(sigmas)), whole] = terms
    return weights.reshape(len(sigmas), rows)


def gaussian_blur(x: Tensor, weights: Tensor, bank: Tensor) -> Tensor:
    """Blurs images (N, C, S, S) along both axes by the matrices that weights (N, 4 R) make of the bank.

    The matrices are zero away from the diagonal, so that a band of lines needs only itself and the pixels
    within reach. On a CPU this takes half the time of the full products.
    """
    size = x.shape[3]
    reach = _PASSES * len(bank) // 4  # the box of whole radius r touches pixels r + 1 away
    matrices = (weights @ bank).view(-1, size, size).to(x.dtype)
    bands = [
        (slice(start, start + _BAND), slice(max(0, start - reach), start + _BAND + reach))
        for start in range(0, size, _BAND)
    ]
    across = torch.empty_like(x)
    lines, blurred_lines = x.flatten(1, 2), across.flatten(1, 2)  # (N, C S, S)
    for own, near in bands:
        torch.bmm(lines[:, :, near], matrices[:, own, near].mT, out=blurred_lines[:, :, own])
    blurred = torch.empty_like(x)
    for channel in range(x.shape[1]):  # one at a time, so that the matrices need not be repeated
        for own, near in bands:
            torch.bmm(matrices[:, own, near], across[:, channel, near], out=blurred[:, channel, own])
    return blurred


def _box_radius(sigmas: NDArray[np.float64]) -> NDArray[np.float64]:
    """The fractional radius of the box whose repetition has the variance of each sigma."""
    variance = sigmas**2 / _PASSES
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    radius: NDArray[np.float64] = whole + part
    return radius
