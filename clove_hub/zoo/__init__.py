"""Finding out what a file of weights is, reading it safely, naming its tensors as another framework does."""

from .checkpoints import counted, read_tensors, require_finite, require_names_and_shapes
from .formats import FORMATS, Format, looks_like_detectron2, rename
from .released import Encoder, Released, read_released, recognise
from .resnets import RESNETS, ResNet, find_resnet

__all__ = [
    "FORMATS",
    "RESNETS",
    "Encoder",
    "Format",
    "Released",
    "ResNet",
    "counted",
    "find_resnet",
    "looks_like_detectron2",
    "read_released",
    "read_tensors",
    "recognise",
    "rename",
    "require_finite",
    "require_names_and_shapes",
]
