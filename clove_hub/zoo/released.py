"""Checkpoints that the papers' authors released, recognised by their keys and given our names.

A released checkpoint holds a whole method: student, teacher, heads. Nothing is dropped and nothing is cast on
the way (a float64 checkpoint stays float64), so that what comes out is a complete state of our method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from .checkpoints import read_tensors, require_names_and_shapes
from .resnets import RESNETS, find_resnet

Encoder = Literal["student", "teacher"]

CLOVE_PARTS = {
    "encoder.": "student.backbone.",
    "projector.": "student.projector.",
    "self_attn.in_proj_": "student.predictor.qkv.",
    "self_attn.out_proj.": "student.predictor.out.",
    "encoder_k.": "teacher.backbone.",
    "projector_k.": "teacher.projector.",
}
"""What a name begins with in the released CLoVE code (sthalles/CLoVE on GitHub), after `module.`; and with us."""


@dataclass(frozen=True)
class Released:
    """A released checkpoint, read."""

    format: str
    """The method whose code wrote it."""
    architecture: str
    """The backbone's name in timm."""
    exported: Encoder
    """Which encoder the paper's downstream results were made with."""
    tensors: dict[str, Tensor]
    """By the names of our method's state dict."""

    def backbone(self, encoder: Encoder) -> dict[str, Tensor]:
        """One of the two backbones, by timm's names."""
        prefix = f"{encoder}.backbone."
        return {name[len(prefix) :]: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


def read_released(path: str | Path) -> Released:
    """Reads a checkpoint that a paper's authors released.

    Raises:
        ValueError: the file cannot be read safely (`read_tensors`), it is no known format, or a tensor is
            missing, unexpected or mis-shaped.
    """
    tensors, _ = read_tensors(path)
    released = recognise(tensors, str(path))
    if released is None:
        raise ValueError(
            f"{path} is no released checkpoint known here: found {len(tensors)} tensors such as "
            f"{', '.join(list(tensors)[:3])}; expected CLoVE's (module.encoder.*, module.encoder_k.*, "
            "module.self_attn.*)"
        )
    return released


def recognise(tensors: Mapping[str, Tensor], what: str) -> Released | None:
    """What these tensors are, if they are a released format; None if they are not.

    Raises:
        ValueError: they are one, but a tensor is missing, unexpected or mis-shaped.
    """
    bare = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if {"encoder.conv1.weight", "encoder_k.conv1.weight", "self_attn.in_proj_weight"} <= bare.keys():
        return _clove(bare, f"{what} (a CLoVE checkpoint)")
    return None


def _clove(bare: Mapping[str, Tensor], what: str) -> Released:
    tensors = {}
    for name, tensor in bare.items():
        prefix = next((prefix for prefix in CLOVE_PARTS if name.startswith(prefix)), None)
        # What has no place of ours keeps its name, and is reported as unexpected below.
        tensors[name if prefix is None else CLOVE_PARTS[prefix] + name[len(prefix) :]] = tensor

    released = Released("clove", "", "student", tensors)
    architecture = find_resnet(released.backbone("student"), what)
    network = RESNETS[architecture]
    hidden, out = (_rows(tensors, f"student.projector.{layer}.weight") for layer in ("linear1", "linear2"))
    expected: dict[str, tuple[int, ...]] = {}
    for encoder in ("student", "teacher"):
        expected |= {f"{encoder}.backbone.{name}": shape for name, shape in network.shapes.items()}
        expected |= {
            f"{encoder}.projector.{name}": shape for name, shape in _projector(network.channels, hidden, out).items()
        }
    expected |= {
        "student.predictor.qkv.weight": (3 * out, out),
        "student.predictor.qkv.bias": (3 * out,),
        "student.predictor.out.weight": (out, out),
        "student.predictor.out.bias": (out,),
    }
    require_names_and_shapes(tensors, expected, what)
    return Released("clove", architecture, "student", tensors)


def _projector(channels: int, hidden: int, out: int) -> dict[str, tuple[int, ...]]:
    """Two 1x1 convolutions without bias, each with a batch norm, the second of which has no affine part."""
    return {
        "linear1.weight": (hidden, channels, 1, 1),
        "bn1.weight": (hidden,),
        "bn1.bias": (hidden,),
        "bn1.running_mean": (hidden,),
        "bn1.running_var": (hidden,),
        "bn1.num_batches_tracked": (),
        "linear2.weight": (out, hidden, 1, 1),
        "bn2.running_mean": (out,),
        "bn2.running_var": (out,),
        "bn2.num_batches_tracked": (),
    }


def _rows(tensors: Mapping[str, Tensor], name: str) -> int:
    """Output channels of a convolution; 0 if it is missing, which is reported with the rest."""
    return tensors[name].shape[0] if name in tensors and tensors[name].ndim else 0
