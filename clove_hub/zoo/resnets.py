"""The ResNets whose weights several frameworks share: identified by names and shapes, renamed between frameworks.

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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from torch import Tensor

from clove_hub.weights.architectures import architecture

from .checks import differences, printable

Format = Literal["timm", "torchvision", "mmseg", "detectron2"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class ResNet:
    """A ResNet (He et al. 2016) with the stride in the 3x3 convolution, as timm and torchvision build it."""

    name: str
    depth: int
    groups: int = 1
    width: int = 64
    """Channels of each group in the first stage's 3x3 convolutions."""

    @property
    def bottleneck(self) -> bool:
        return self.depth >= 50

    @property
    def channels(self) -> int:
        """Channels of the last feature map."""
        return 2048 if self.bottleneck else 512

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the headless network, by its name in timm and torchvision."""
        return architecture(self.name).shapes


RESNETS = {
    network.name: network
    for network in (
        *(ResNet(f"resnet{depth}", depth) for depth in (18, 34, 50, 101, 152)),
        ResNet("resnext50_32x4d", 50, groups=32, width=4),
        ResNet("resnext101_32x8d", 101, groups=32, width=8),
        ResNet("wide_resnet50_2", 50, width=128),
        ResNet("wide_resnet101_2", 101, width=128),
    )
}
"""ResNets by their name in timm and torchvision."""
FAMILIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("the whole state of a run (give the run's folder)", (r"student\.backbone\.", r"teacher\.backbone\.")),
    ("a torchvision detector", (r"backbone\.body\.", r"rpn\.head\.")),
    ("a torchvision segmenter", (r"backbone\.conv1\.", r"classifier\.\d+\.")),
    ("a Detectron2 detector", (r"backbone\.(bottom_up|stem)\.", r"(proposal_generator|roi_heads|head)\.")),
    ("an MMDetection detector", (r"backbone\.", r"(rpn_head|roi_head|bbox_head)\.")),
    ("an MMSegmentation network", (r"backbone\.", r"decode_head\.")),
    ("a DETR detector", (r"query_embed\.weight", r"transformer\.")),
    ("a YOLO detector", (r"model\.\d+\.(cv\d|conv)\.",)),
    ("a Swin transformer", (r"layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table",)),
    ("a vision transformer", (r"(patch_embed\.proj|patch_embeddings\.projection|conv_proj)\.weight",)),
    ("a vision transformer", (r"(cls_token|class_token|class_embedding)",)),
    ("a ConvNeXt", (r"(stages\.\d+\.)(blocks\.)?\d+\.(conv_dw|dwconv|depthwise_conv)\.",)),
    ("a ResNet with a deep stem (ResNet-D)", (r"conv1\.\d+\.weight", r"layer1\.0\.conv1\.weight")),
    ("a ResNet in the names of transformers", (r"embedder\.embedder\.convolution\.weight",)),
    ("an EfficientNet or MobileNet", (r"(conv_stem|_conv_stem|features\.0\.0)\.weight",)),
    ("a VGG or AlexNet", (r"features\.0\.weight",)),
    ("a language model", (r"(embed_tokens|wte|word_embeddings)\.weight",)),
    ("a diffusion model", (r"(down_blocks\.0|input_blocks\.0)\.",)),
    ("a set of LoRA weights", (r"lora_(A|B|up|down)",)),
)
"""Families of networks, each with patterns that must all match the start of a part of its names."""


def closest_resnet(tensors: Mapping[str, Tensor]) -> str:
    """The closest match of these tensors in RESNETS."""
    # The most tensors in place; of several such, the one with the fewest missing.
    return max(RESNETS, key=lambda name: (in_place(tensors, RESNETS[name].shapes), -len(RESNETS[name].shapes)))


def find_resnet(tensors: Mapping[str, Tensor], what: str) -> str:
    """Identify one of RESNETS, by the names of timm and torchvision and without a classifier.

    Raises:
        ValueError: it is none of them. The message names what was found or, for a close match, what is missing.
    """
    best = closest_resnet(tensors)
    problems = differences(tensors, RESNETS[best].shapes)
    if not problems:
        return best
    if in_place(tensors, RESNETS[best].shapes) * 2 < len(RESNETS[best].shapes):
        raise not_a_resnet(tensors, what)
    raise ValueError(
        f"{what} is not a complete ResNet; it comes closest to {best}, but has {'; '.join(problems)}. "
        "All names and shapes must match."
    )


def not_a_resnet(tensors: Mapping[str, Tensor], what: str) -> ValueError:
    """The error that states what these tensors are instead, as far as known, and the closest ResNet."""
    kind = family(tensors)
    return ValueError(
        f"{what} is {f'{kind}, ' if kind else ''}not a ResNet: found {len(tensors)} tensors such as "
        f"{', '.join(map(printable, list(tensors)[:3]))}; expected one of {', '.join(RESNETS)}{_nearest(tensors)}"
    )


def _nearest(tensors: Mapping[str, Tensor]) -> str:
    """The location of a ResNet among tensors with otherwise unknown names."""
    first = next((name for name in tensors if name.endswith("layer1.0.conv1.weight")), None)
    if first is None:
        return ""
    start = first.removesuffix("layer1.0.conv1.weight")
    part = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    best = closest_resnet(part)
    problems = differences(part, RESNETS[best].shapes)
    return (
        f". The closest is a {best} as {printable(start)}* "
        f"({'; '.join(problems) or 'complete'}; {len(tensors) - len(part)} tensors beside it)"
    )


def in_place(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Number of tensors with a matching name and shape."""
    return sum(shapes.get(name) == tuple(tensor.shape) for name, tensor in tensors.items())


def family(names: Iterable[str]) -> str | None:
    """The family of a network with these tensor names; None if unknown."""
    listed = "\n".join(names)
    for title, patterns in FAMILIES:
        if all(re.search(rf"(^|\.){pattern}", listed, re.MULTILINE) for pattern in patterns):
            return title
    return None


def rename(
    tensors: Mapping[str, Tensor], source: Format, target: Format, what: str = "the network"
) -> dict[str, Tensor]:
    """The same tensors, in the same order, under the names of another framework. `rename` back gives the input.

    Args:
        tensors: a complete ResNet without its classifier (see `RESNETS`).
        what: its name in error messages.

    Raises:
        ValueError: a tensor is unexpected, missing or mis-shaped; or it is not a ResNet.
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
    """Whether these are a Detectron2 backbone's names, without a prefix, as in a file of initial weights."""
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
    assert match, timm_name  # ensured by find_resnet
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
