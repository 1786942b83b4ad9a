"""The worker stage: from a decoded image and its draw to resized crops in the tensors of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .auto_augment import auto_augment
from .draw import Draw
from .spec import Interpolation, ViewSpec

# What F.interpolate(..., mode="bicubic", antialias=True) calls, with a place for the result: an eighth of a worker's
# time goes into allocating the crops and copying them otherwise.
_RESIZE: dict[Interpolation, Callable[..., Tensor]] = {
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
}
_PILLOWS: dict[Interpolation, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


_KINDS = {8: torch.uint8, 16: torch.float32}


@dataclass(frozen=True)
class ColorPlan:
    """The operations of the device stage on the crops of one group: the fields of `Draw`, for V views of B samples.

    These are NumPy arrays on purpose. The device stage reads them on the host to make its index lists; if they moved
    with the tensors of a batch, reading them back would stall the accelerator.
    """

    flipped: NDArray[np.bool_]  # (V, B)
    jittered: NDArray[np.bool_]  # (V, B)
    orders: NDArray[np.int8]  # (V, B, 4)
    factors: NDArray[np.float32]  # (V, B, 4)
    gray: NDArray[np.bool_]  # (V, B)
    sigmas: NDArray[np.float32]  # (V, B)
    solarized: NDArray[np.bool_]  # (V, B)


@dataclass(frozen=True)
class CropBatch:
    """The crops of B samples, one entry for each group of views of one size (`ViewSpec.groups`).

    The crops are neither flipped nor colored yet; `DeviceViews` does both by the plan. The boxes are final:
    x is already swapped where a view is flipped.
    """

    crops: list[Tensor]  # uint8 (V, B, S, S, C); of 16-bit images float32, in units of which 255 are white
    boxes: list[Tensor]  # float32 (V, B, 4)
    flipped: list[Tensor]  # bool (V, B)
    color: list[ColorPlan]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CropBatch:
        """The same batch with its tensors on `device`; the plan stays on the host."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> CropBatch:
        """The same batch in page-locked memory; a DataLoader with `pin_memory=True` calls this."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> CropBatch:
        moved = {name: [change(tensor) for tensor in getattr(self, name)] for name in ("crops", "boxes", "flipped")}
        return CropBatch(**moved, color=self.color)


def allocate(spec: ViewSpec, samples: int, shared: bool = False) -> CropBatch:
    """A batch with room for `samples` samples, whose content is undefined until `write_sample` fills it.

    `shared` puts its tensors in shared memory, from where another process gets them without a copy.

    Raises:
        ValueError: `samples` is less than one.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; a batch has at least one")
    empty = _empty_shared if shared else torch.empty
    batch = CropBatch(crops=[], boxes=[], flipped=[], color=[])
    for group in spec.groups:
        views, size = group.stop - group.start, spec.views[group.start].size
        batch.crops.append(empty((views, samples, size, size, spec.bands), dtype=_KINDS[spec.depth]))
        batch.boxes.append(empty((views, samples, 4), dtype=torch.float32))
        batch.flipped.append(empty((views, samples), dtype=torch.bool))
        batch.color.append(
            ColorPlan(
                flipped=np.empty((views, samples), dtype=np.bool_),
                jittered=np.empty((views, samples), dtype=np.bool_),
                orders=np.empty((views, samples, 4), dtype=np.int8),
                factors=np.empty((views, samples, 4), dtype=np.float32),
                gray=np.empty((views, samples), dtype=np.bool_),
                sigmas=np.empty((views, samples), dtype=np.float32),
                solarized=np.empty((views, samples), dtype=np.bool_),
            )
        )
    return batch


def _empty_shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Like torch's own collation makes it: `share_memory_` would first fill and then copy ordinary memory."""
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def write_sample(
    batch: CropBatch,
    position: int,
    image: NDArray[np.unsignedinteger] | Sequence[NDArray[np.unsignedinteger]],
    draw: Draw,
) -> None:
    """Cuts the crops of `draw` out of `image`, resizes and auto-augments them and writes them to `position` in `batch`.

    The resize has antialiasing over the crop alone, like Pillow's `crop` followed by `resize`.

    Args:
        batch: a batch from `allocate`.
        position: the index of the sample in the batch.
        image: uint8 (H, W, C), the image for whose H and W the draw was made, or what its crops cut out of it, in the
            order of the views. For a spec of 16 bits uint16 as well.
        draw: the sample's parameters.

    Raises:
        ValueError: the image is of another type or has another number of bands.
    """
    whole = _planes(image, batch) if isinstance(image, np.ndarray) else None
    first = 0
    for crops, boxes, flipped, color in zip(batch.crops, batch.boxes, batch.flipped, batch.color, strict=True):
        views, size = crops.shape[0], crops.shape[2]
        own = slice(first, first + views)
        for view, (top, left, height, width) in enumerate(draw.crops[own].tolist()):
            number = first + view
            if whole is None:
                region = _planes(image[number], batch)
            else:
                region = whole[:, :, top : top + height, left : left + width]
            if draw.policies[number] >= 0:
                pixels = region[0].permute(1, 2, 0).numpy()
                crops.numpy()[view, position] = _auto_augmented(pixels, size, draw, number)
                continue
            _RESIZE[draw.interpolations[number]](
                *(region, [size, size], False, None, None),
                out=crops[view, position : position + 1].permute(0, 3, 1, 2),
            )
        if crops.is_floating_point():  # bicubic goes beyond black and white, which the kernel for uint8 cuts off itself
            crops[:, position].clamp_(0, 255)
        boxes.numpy()[:, position] = draw.boxes[own]
        flipped.numpy()[:, position] = draw.flipped[own]
        for name, values in vars(color).items():
            values[:, position] = getattr(draw, name)[own]
        first += views
    assert first == len(draw.crops), "the batch and the draw were made for different specs"


def _planes(image: NDArray[np.unsignedinteger], batch: CropBatch) -> Tensor:
    """An image (H, W, C) as what the resize takes: (1, C, H, W), uint8 in place or float32, as the batch's crops are."""
    crops = batch.crops[0]
    deep = image.dtype == np.uint16 and crops.is_floating_point()
    if not (deep or image.dtype == np.uint8) or image.ndim != 3 or image.shape[2] != crops.shape[4]:
        kinds = "uint8 or uint16" if crops.is_floating_point() else "uint8"
        raise ValueError(
            f"an image has shape {image.shape} and type {image.dtype}; expected {kinds} (H, W, {crops.shape[4]})"
        )
    # The batch axis must be added before the permutation: only then are the strides channels_last,
    # and with it torch takes its interleaved uint8 kernel and its output needs no transposition.
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"]))[None].permute(0, 3, 1, 2)
    if not crops.is_floating_point():
        return pixels
    return pixels.float().div_(257) if deep else pixels.float()


def _auto_augmented(region: NDArray[np.uint8], size: int, draw: Draw, number: int) -> NDArray[np.uint8]:
    """View `number` of a draw, uint8 (size, size, 3), not flipped yet.

    By Pillow from the crop on: equalizing turns a level that was rounded otherwise into many. The release flips first,
    which decides what is rotated and sheared to which side; so it is mirrored before and, as the device flips it, after.
    """
    around = slice(None, None, -1 if draw.flipped[number] else 1)
    picture = Image.fromarray(region).resize((size, size), _PILLOWS[draw.interpolations[number]])
    mirrored = Image.fromarray(np.asarray(picture)[:, around])
    policy = int(draw.policies[number])
    return np.asarray(auto_augment(mirrored, policy, draw.applied[number], draw.negative[number]))[:, around]
