"""The heads in released files: the name and the shape of each of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

Shape: TypeAlias = "tuple[int | str, ...]"
"""Shape of a tensor in a head. A word stands for the same number everywhere; `channels` is that of the backbone's last
feature map, `3 out` is three times `out`."""
Shapes: TypeAlias = Mapping[str, Shape]


def linear(at: str, out: int | str, into: int | str, bias: bool = True, sides: tuple[int, ...] = ()) -> Shapes:
    return {f"{at}.weight": (out, into, *sides)} | ({f"{at}.bias": (out,)} if bias else {})


conv = partial(linear, sides=(1, 1))


def norm(at: str, width: str, affine: bool = True) -> Shapes:
    leaves = ("weight", "bias", "running_mean", "running_var")[0 if affine else 2 :]
    return {**{f"{at}.{leaf}": (width,) for leaf in leaves}, f"{at}.num_batches_tracked": ()}


def plain_mlp(at: str, hidden: str, into: str, bias: bool = False) -> Shapes:
    """Two layers, each with a batch norm."""
    return {
        **linear(f"{at}.0", hidden, into, bias),
        **norm(f"{at}.1", hidden),
        **linear(f"{at}.3", hidden, hidden, bias),
        **norm(f"{at}.4", hidden),
    }


def clove_projector(at: str) -> Shapes:
    """Two 1x1 convolutions without bias, each with a batch norm, the second one not affine."""
    return {
        **conv(f"{at}.linear1", "hidden", "channels", bias=False),
        **norm(f"{at}.bn1", "hidden"),
        **conv(f"{at}.linear2", "out", "hidden", bias=False),
        **norm(f"{at}.bn2", "out", affine=False),
    }


def pixpro_projector(at: str, into: str = "channels") -> Shapes:
    return {
        **conv(f"{at}.linear1", "hidden", into),
        **norm(f"{at}.bn1", "hidden"),
        **conv(f"{at}.linear2", "out", "hidden"),
    }


def slotcon_mlp(at: str, into: str, layer: Callable[[str, str, str], Shapes]) -> Shapes:
    return {
        **layer(f"{at}.mlp.0", "hidden", into),
        **norm(f"{at}.mlp.1", "hidden"),
        **layer(f"{at}.mlp.3", "hidden", "hidden"),
        **norm(f"{at}.mlp.4", "hidden"),
        **layer(f"{at}.mlp.6", "out", "hidden"),
    }


def moco_head(at: str) -> Shapes:
    return {**linear(f"{at}.0", "hidden", "channels"), **linear(f"{at}.2", "out", "hidden")}


def moco_v3_mlp(at: str, into: str) -> Shapes:
    return {
        **linear(f"{at}.0", "hidden", into, bias=False),
        **norm(f"{at}.1", "hidden"),
        **linear(f"{at}.3", "out", "hidden", bias=False),
        **norm(f"{at}.4", "out", affine=False),
    }


def simsiam_heads() -> Shapes:
    """Heads of the original code: the projector replaces the ResNet's classifier."""
    return {
        **plain_mlp("encoder.fc", "channels", "channels"),
        **linear("encoder.fc.6", "out", "channels"),
        **norm("encoder.fc.7", "out", affine=False),
        **linear("predictor.0", "hidden", "out", bias=False),
        **norm("predictor.1", "hidden"),
        **linear("predictor.3", "out", "hidden"),
    }


def densecl_neck(at: str) -> Shapes:
    """OpenSelfSup's neck: one MLP on the pooled features, one on each cell."""
    return {
        **moco_head(f"{at}.mlp"),
        **conv(f"{at}.mlp2.0", "hidden", "channels"),
        **conv(f"{at}.mlp2.2", "out", "hidden"),
    }


def queue(name: str) -> Shapes:
    """Keys of earlier images, one per column, and the position of the next one."""
    return {name: ("out", "length"), f"{name}_ptr": (1,)}
