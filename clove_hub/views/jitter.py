"""Color operations on images (N, 3, S, S) in 8-bit levels, 0 to 255, with a setting for each image.

With `rounded` each operation ends as Pillow's does on uint8 images; without it, as torchvision's on floats.
"""

import torch
from torch import Tensor

_WEIGHTS = (19595 / 2**16, 38470 / 2**16, 7471 / 2**16)  # Pillow's 0.299, 0.587, 0.114; exact in float32


def gray(x: Tensor, rounded: bool) -> Tensor:
    """The luminance (N, 1, S, S) of each pixel."""
    red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    luminance = (red * _WEIGHTS[0]).add_(green, alpha=_WEIGHTS[1]).add_(blue, alpha=_WEIGHTS[2])
    return luminance.add_(0.5).floor_() if rounded else luminance


def blend_(x: Tensor, factor: Tensor, to_gray: Tensor | None, to_mean: Tensor | None, rounded: bool) -> None:
    """x <- clamp(d + factor (x - d)) with d = to_gray gray(x) + to_mean mean(gray(x)), in place.

    One form for three operations: brightness has d = 0, saturation d = gray(x), contrast d = mean(gray(x)). All
    settings have shape (N, 1, 1, 1); `to_gray` and `to_mean` are 0 or 1, and None, for zeros, saves their cost.
    """
    if to_gray is None and to_mean is None:
        x.mul_(factor)
    else:
        d = gray(x, rounded)
        mean = None
        if to_mean is not None:
            # Tens of thousands of levels add up to more than float16 holds.
            mean = d.mean((2, 3), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
            mean = (mean.add_(0.5).floor_() if rounded else mean).to(x.dtype) * to_mean
        if to_gray is not None:
            d.mul_(to_gray)
            d = d if mean is None else d.add_(mean)
        elif mean is not None:
            d = mean
        x.sub_(d).mul_(factor).add_(d)
    x.clamp_(0, 255)
    if rounded:
        x.floor_()


def turn_hue_(x: Tensor, turns: Tensor, rounded: bool) -> None:
    """Turns each image's hue, in place, by its part of the color circle in `turns` (N, 1, 1).

    In HSV a channel is value minus chroma times a trapezoid of the hue: with hue h in sixths of the circle,
    0 to 1 of the chroma is missing from red near h = 3, from green near 5 and from blue near 1. This needs
    neither the six cases of the usual conversion nor a look-up for each pixel.
    """
    red, green, blue = x.unbind(1)  # (N, S, S), as all below
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # Hue times chroma, by which channel is the largest. On a CPU this is three times faster than torch.where.
    not_red, not_green = (value - red).sign_(), (value - green).sign_()  # 0 or 1
    elsewhere = torch.lerp((blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4), not_green)
    sixths = torch.lerp(green - blue, elsewhere, not_red)
    floor = chroma.clamp_min(1e-3)  # a gray pixel has no hue, and none is needed: its chroma is zero
    if rounded:
        # Pillow's HSV has 256 levels for the hue and saturation too, and cuts off their fractions.
        levels = (sixths * 42.5).div_(floor)
        levels += 255 * (levels < 0)
        levels = levels.floor_().add_((turns * 255).trunc_())
        sixths = levels.sub_((levels / 256).floor_(), alpha=256).mul_(6 / 255)
        chroma = value * (chroma * 255).div_(value.clamp_min(1)).floor_().div_(255)
    else:
        sixths.div_(floor).add_(turns * 6)
        sixths.sub_((sixths / 6).floor_(), alpha=6)
    missing = (
        (sixths - 3).abs_().neg_().add_(2),  # from red, then green and blue
        (sixths - 2).abs_().sub_(1),
        (sixths - 4).abs_().sub_(1),
    )
    for channel, part in zip((red, green, blue), missing, strict=True):
        torch.addcmul(value, chroma, part.clamp_(0, 1), value=-1, out=channel)
    if rounded:
        x.add_(0.5).floor_()
