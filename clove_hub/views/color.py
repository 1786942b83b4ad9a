"""The device stage: from crops to flipped, augmented, normalized views, on a CPU or an accelerator.

The host selects the samples of an operation from the NumPy plan and passes them to the device as ranges and index
lists. Nothing is read back, so there is no host-device synchronization.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .blur import box_bank, box_weights, gaussian_blur
from .crop import ColorPlan, CropBatch
from .spec import ViewSpec

_CONTRAST, _SATURATION, _HUE = 1, 2, 3  # as in `draw.ORDERS`; brightness is 0
_NEVER = 4  # the turn of hue in a sample without jitter
_WEIGHTS = (19595 / 2**16, 38470 / 2**16, 7471 / 2**16)  # Pillow's 0.299, 0.587, 0.114; exact in float32

# Pixels worked on at once. On a CPU a chunk and its temporaries should stay in the cache; an accelerator is
# kept busy by this many, 100 MB for each float32 copy, and needs no more however large the batch is.
_CPU_PIXELS = 2**17
_ACCELERATOR_PIXELS = 2**23


class Views(NamedTuple):
    """The V views of one size of B samples, ready for a network."""

    pixels: Tensor  # (V, B, C, S, S), normalized; seen as (V * B, C, S, S) it is channels_last
    boxes: Tensor  # float32 (V, B, 4)
    flipped: Tensor  # bool (V, B)


class DeviceViews(nn.Module):
    """Turns a `CropBatch` into one `Views` for each group: flip, jitter, gray, blur, solarize, normalize.

    It must be on the device of the batch. It has no parameters or state.

    Args:
        spec: the spec that the batches are made with.
        dtype: the type of the computation and of the result.
        round_like_pillow: round after each operation as Pillow does on uint8 images, hue and saturation included. For
            comparison with such transforms; it does not help training.

    Raises:
        ValueError: `dtype` is not float16, float32 or float64; in `forward`, batch and module are on two
            devices.

    Examples:
        >>> import clove_hub, torch
        >>> transform = clove_hub.Transform("demo")
        >>> batch = clove_hub.collate([transform(path) for path in sorted(photos.iterdir())[:2]])
        >>> [tuple(group.pixels.shape) for group in clove_hub.DeviceViews(transform.view_spec)(batch)]
        [(2, 2, 3, 128, 128), (4, 2, 3, 64, 64)]
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, spec: ViewSpec, dtype: torch.dtype = torch.float32, round_like_pillow: bool = False) -> None:
        super().__init__()
        if dtype not in (torch.float16, torch.float32, torch.float64):
            raise ValueError(
                f"views cannot be computed in {dtype}: use torch.float16 or torch.float32 (bfloat16 cannot "
                "represent 256 levels; the network may still run in it under autocast)"
            )
        self.dtype = dtype
        self.rounded = round_like_pillow
        scale = 1 / (255 * np.array(spec.std))
        shift = -255 * np.array(spec.mean) * scale
        self.register_buffer("scale", torch.from_numpy(scale).to(dtype).view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", torch.from_numpy(shift).to(dtype).view(-1, 1, 1), persistent=False)
        for number, group in enumerate(spec.groups):
            views = spec.views[group]
            widest = max((view.blur_sigma[1] for view in views if view.blur), default=0.0)
            self.register_buffer(f"bank{number}", box_bank(views[0].size, widest), persistent=False)

    @torch.no_grad()
    def forward(self, batch: CropBatch) -> list[Views]:
        # Autocast would carry out the blur's matrix products in half precision.
        with torch.autocast(self.scale.device.type, enabled=False):
            return [
                Views(self._group(crops, plan, self.get_buffer(f"bank{number}")), boxes, flipped)
                for number, (crops, boxes, flipped, plan) in enumerate(
                    zip(batch.crops, batch.boxes, batch.flipped, batch.color, strict=True)
                )
            ]

    def _group(self, crops: Tensor, plan: ColorPlan, bank: Tensor) -> Tensor:
        """Normalized pixels (V, B, C, S, S) of one group from its crops (V, B, S, S, C), in 8-bit levels."""
        device = crops.device
        if device != self.scale.device:
            raise ValueError(
                f"the crops are on {device}, but DeviceViews on {self.scale.device}: move one to the other"
            )
        views, samples, size, _, bands = crops.shape
        crops = crops.flatten(0, 1)
        pixels = torch.empty(
            (len(crops), bands, size, size), dtype=self.dtype, device=device, memory_format=torch.channels_last
        )
        limit = _CPU_PIXELS if device.type == "cpu" else _ACCELERATOR_PIXELS
        ordered, most = _sorted_steps(plan), max(1, limit // size**2)
        for start in range(0, len(crops), most):
            steps = ordered.take(slice(start, start + most))
            ids = _send(steps.ids, device)
            pixels.index_copy_(0, ids, self._chunk(crops.index_select(0, ids), steps, bank))
        return pixels.view(views, samples, bands, size, size)

    def _chunk(self, crops: Tensor, steps: _Steps, bank: Tensor) -> Tensor:
        """Normalized pixels (N, C, S, S) of some crops (N, S, S, C), which this may overwrite."""
        _change(crops, steps.flipped, lambda some: some.flip(2))
        x = crops.permute(0, 3, 1, 2).to(self.dtype, memory_format=torch.contiguous_format)
        self._jitter(x, steps)
        _change(x, steps.gray, lambda some: gray(some, self.rounded).expand_as(some))
        blurred = steps.sigmas > 0
        _change(x, blurred, lambda some: self._blur(some, steps.sigmas[blurred], bank))
        _change(x, steps.solarized, lambda some: torch.minimum(some, 255 - some))  # inverts from 128 on
        # Interleaving the planes here is cheaper than leaving it to the index_copy_ that follows.
        return x.mul_(self.scale).add_(self.shift).contiguous(memory_format=torch.channels_last)

    def _jitter(self, x: Tensor, steps: _Steps) -> None:
        """Color jitter, in place: three blends, in each sample's own order, and hue when its turn comes."""
        starts = np.searchsorted(steps.turns, range(_NEVER + 1)).tolist()  # the steps are sorted by turn
        jittered = starts[_NEVER]
        if not jittered:
            return
        color = x.shape[1] == 3  # other bands have brightness and contrast alone: their other factors do nothing
        settings = _send(steps.settings[:jittered], x.device).to(x.dtype)[:, :, None, None, None]
        for turn in range(4):
            own = slice(starts[turn], starts[turn + 1])
            if own.start < own.stop and color:
                turn_hue_(x[own], settings[own, 9, 0], self.rounded)
            if turn < 3:
                kinds = steps.kinds[:jittered, turn]
                factor, to_gray, to_mean = settings[:, turn], settings[:, 3 + turn], settings[:, 6 + turn]
                blend_(
                    x[:jittered],
                    factor,
                    to_gray if color and (kinds == _SATURATION).any() else None,
                    to_mean if (kinds == _CONTRAST).any() else None,
                    self.rounded,
                )

    def _blur(self, x: Tensor, sigmas: NDArray[np.float32], bank: Tensor) -> Tensor:
        blurred = gaussian_blur(x, _send(box_weights(sigmas, len(bank)), x.device), bank)
        return blurred.add_(0.5).floor_() if self.rounded else blurred


class _Steps(NamedTuple):
    """The plan of N samples of one group, in the order in which they are worked on."""

    ids: NDArray[np.int64]  # (N,): where the sample stands in the flattened group
    flipped: NDArray[np.bool_]  # (N,)
    turns: NDArray[np.int64]  # (N,): how many blends come before hue, ascending; 4 without jitter
    kinds: NDArray[np.int8]  # (N, 3): the blends in turn: brightness, contrast or saturation
    settings: NDArray[np.float32]  # (N, 10): factor, to_gray, to_mean of three blends each; turn of the hue
    gray: NDArray[np.bool_]  # (N,)
    sigmas: NDArray[np.float32]  # (N,)
    solarized: NDArray[np.bool_]  # (N,)

    def take(self, samples: NDArray[np.int64] | slice) -> _Steps:
        return _Steps._make(array[samples] for array in self)


def _sorted_steps(plan: ColorPlan) -> _Steps:
    """Sorts the samples of a group so that those that have the same done to them come together.

    Hue then concerns a range of samples in each turn, and a CPU's small chunks mostly hold one operation.
    """
    flipped, jittered, orders, factors, grayed, sigmas, solarized = (
        values.reshape(-1, *values.shape[2:]) for values in vars(plan).values()
    )
    turns = np.where(jittered, (orders == _HUE).argmax(axis=1), _NEVER)
    kinds = orders[orders != _HUE].reshape(-1, 3)
    strengths = np.take_along_axis(factors, kinds.astype(np.int64), axis=1)  # (N, 3)
    settings = np.concatenate([strengths, kinds == _SATURATION, kinds == _CONTRAST, factors[:, _HUE:]], axis=1)
    order = np.lexsort((flipped, grayed, sigmas > 0, kinds[:, 1], kinds[:, 0], turns))
    steps = _Steps(np.arange(len(turns)), flipped, turns, kinds, settings, grayed, sigmas, solarized)
    return steps.take(order)


def _change(x: Tensor, where: NDArray[np.bool_], change: Callable[[Tensor], Tensor]) -> None:
    """x <- change(x) for the samples of `x` at which `where` holds, in place."""
    numbers = np.flatnonzero(where)
    if not len(numbers):
        return
    first, last = int(numbers[0]), int(numbers[-1])
    if last - first + 1 == len(numbers):  # sorting has made most of them ranges, which need no index list
        some = x[first : last + 1]
        some.copy_(change(some))
    else:
        rows = _send(numbers, x.device)
        x.index_copy_(0, rows, change(x.index_select(0, rows)))


def _send(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """The array on the device, without waiting: only a copy from page-locked memory leaves the host free."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# ---- operations on images (N, C, S, S) in 8-bit levels, 0 to 255, with a setting for each image ----------------------
#
# With `rounded` each ends as Pillow's does on uint8 images; without it, as torchvision's on floats.


def gray(x: Tensor, rounded: bool) -> Tensor:
    """The luminance (N, 1, S, S) of each pixel."""
    red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    luminance = (red * _WEIGHTS[0]).add_(green, alpha=_WEIGHTS[1]).add_(blue, alpha=_WEIGHTS[2])
    return luminance.add_(0.5).floor_() if rounded else luminance


def blend_(x: Tensor, factor: Tensor, to_gray: Tensor | None, to_mean: Tensor | None, rounded: bool) -> None:
    """x <- clamp(d + factor (x - d)) with d = to_gray gray(x) + to_mean mean(gray(x)), in place.

    One form for three operations: brightness has d = 0, saturation d = gray(x), contrast d = mean(gray(x)). Where bands are
    no colors gray(x) is x: contrast is about each band's own mean. All settings have shape (N, 1, 1, 1); `to_gray` and `to_mean` are 0 or 1, and None, for zeros, saves their cost.
    """
    if to_gray is None and to_mean is None:
        x.mul_(factor)
    else:
        d = gray(x, rounded) if x.shape[1] == 3 else x
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
