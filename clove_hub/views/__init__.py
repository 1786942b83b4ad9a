"""The views of an image that a method receives: random crops with their boxes, and their color augmentation.

`ViewSpec` specifies them. `draw` draws the parameters of one sample. `allocate` and `write_sample` make the uint8 crops
in a data-loading worker. `DeviceViews` turns a batch of them into normalized pixels on the training device, with the
same code on a CPU and on an accelerator.
"""

from .color import DeviceViews, Views
from .crop import ColorPlan, CropBatch, allocate, write_sample
from .draw import Draw, Purpose, draw, stream
from .spec import IMAGENET_MEAN, IMAGENET_STD, Depth, Interpolation, Jitter, Overlap, View, ViewSpec, for_bands

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ColorPlan",
    "CropBatch",
    "Depth",
    "DeviceViews",
    "Draw",
    "Interpolation",
    "Jitter",
    "Overlap",
    "Purpose",
    "View",
    "ViewSpec",
    "Views",
    "allocate",
    "draw",
    "for_bands",
    "stream",
    "write_sample",
]
