"""One ResNet, four sets of names: pure renamings between timm, torchvision, MMSegmentation and Detectron2.

timm, torchvision and MMSegmentation (its `ResNet`, not its `ResNetV1c` with the deep stem) share their names.
Detectron2 numbers the stages from 2, calls the first layers `stem`, and keeps a norm inside its convolution:

| timm                           | Detectron2                        |
|--------------------------------|-----------------------------------|
| conv1.weight                   | stem.conv1.weight                 |
| bn1.running_mean               | stem.conv1.norm.running_mean      |
| layer1.0.conv2.weight          | res2.0.conv2.weight               |
| layer1.0.bn2.bias              | res2.0.conv2.norm.bias            |
| layer1.0.downsample.0.weight   | res2.0.shortcut.weight            |
| layer1.0.downsample.1.weight   | res2.0.shortcut.norm.weight       |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor

from .resnets import find_resnet

Format = Literal["timm", "torchvision", "mmseg", "detectron2"]
FORMATS: tuple[Format, ...] = get_args(Format)


def rename(
    tensors: Mapping[str, Tensor], source: Format, target: Format, what: str = "the network"
) -> dict[str, Tensor]:
    """The same tensors, in the same order, under the names of another framework. `rename` back gives the input.

    Args:
        tensors: a complete ResNet without its classifier (see `RESNETS`).
        what: how error messages call it.

    Raises:
        ValueError: a tensor has no place, is missing or has the wrong shape; or it is no ResNet at all.
    """
    by_timm_name = {
        (_timm_name(name, what) if source == "detectron2" else name): tensor for name, tensor in tensors.items()
    }
    assert len(by_timm_name) == len(tensors), "two names of Detectron2 became one of timm"
    find_resnet(by_timm_name, what)
    if target != "detectron2":
        return by_timm_name
    return {_detectron2_name(name): tensor for name, tensor in by_timm_name.items()}


def looks_like_detectron2(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are a Detectron2 backbone's names: bare, as in a file to start from, not inside a detector."""
    return "stem.conv1.weight" in tensors and "res2.0.conv1.weight" in tensors


_TIMM = re.compile(
    r"(?:layer(?P<stage>[1-4])\.(?P<block>\d+)\.)?"
    r"(?:(?P<kind>conv|bn)(?P<layer>[123])|downsample\.(?P<part>[01]))\.(?P<leaf>\w+)"
)
_DETECTRON2 = re.compile(
    r"(?:stem|res(?P<stage>[2-5])\.(?P<block>\d+))\."
    r"(?:conv(?P<layer>[123])|shortcut)\.(?P<norm>norm\.)?(?P<leaf>\w+)"
)


def _detectron2_name(timm_name: str) -> str:
    match = _TIMM.fullmatch(timm_name)
    assert match, timm_name  # find_resnet let it pass
    where = f"res{int(match['stage']) + 1}.{match['block']}" if match["stage"] else "stem"
    layer = f"conv{match['layer']}" if match["layer"] else "shortcut"
    norm = "norm." if match["kind"] == "bn" or match["part"] == "1" else ""
    return f"{where}.{layer}.{norm}{match['leaf']}"


def _timm_name(detectron2_name: str, what: str) -> str:
    match = _DETECTRON2.fullmatch(detectron2_name)
    if not match:
        raise ValueError(
            f"{what}: {detectron2_name} is not a tensor of a Detectron2 ResNet (stem.*, res2.* to res5.*); "
            "a whole detector cannot be converted, only a backbone to start from"
        )
    norm = match["norm"] is not None
    layer = f"{'bn' if norm else 'conv'}{match['layer']}" if match["layer"] else f"downsample.{int(norm)}"
    where = f"layer{int(match['stage']) - 1}.{match['block']}." if match["stage"] else ""
    return f"{where}{layer}.{match['leaf']}"
