"""Set-ups that run without complaint and give a wrong figure: each is found before training, in a plain mapping.

All of them have cost people weeks: the public trackers of this field are full of an AP that is too low by 1 to 30
points for one of these reasons.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clove_hub.zoo.resnets import RESNETS


@dataclass(frozen=True)
class Expected:
    """What the backbone needs."""

    architecture: str
    """One of RESNETS."""
    mean: Sequence[float]
    """Of red, green and blue, where white is 255."""
    std: Sequence[float]
    weights: str
    """The converted file."""


def require_right_setup(config: Mapping[str, Any], expected: Expected) -> None:
    """Refuses a config that would fine-tune something else than the backbone.

    Args:
        config: Detectron2's, as nested mappings (a CfgNode is one).

    Raises:
        ValueError: with a sentence for each thing that is wrong.
    """
    if found := list(wrong(config, expected)):
        raise ValueError("this set-up would not show what the backbone is worth:\n  " + "\n  ".join(found))


def wrong(config: Mapping[str, Any], expected: Expected) -> Iterator[str]:
    """A sentence for each thing that is wrong."""
    model, network = config["MODEL"], RESNETS[expected.architecture]
    mean, std = list(model["PIXEL_MEAN"]), list(model["PIXEL_STD"])
    image_format = config["INPUT"]["FORMAT"]
    if image_format != "RGB":
        yield f"INPUT.FORMAT is {image_format!r}: the backbone was trained on RGB, and would see red as blue. Set RGB"
    if not _equal(mean, expected.mean):
        reversed_ = " (that is the order BGR)" if _equal(mean, expected.mean[::-1]) else ""
        yield f"MODEL.PIXEL_MEAN is {mean}{reversed_}: the backbone was trained with {list(expected.mean)}"
    if not _equal(std, expected.std):
        caffe = " (which is for the weights of Caffe that Detectron2 starts from)" if _equal(std, [1, 1, 1]) else ""
        yield f"MODEL.PIXEL_STD is {std}{caffe}: the backbone was trained with {list(expected.std)}"
    resnets = model["RESNETS"]
    if resnets["STRIDE_IN_1X1"]:
        yield (
            "MODEL.RESNETS.STRIDE_IN_1X1 is True: the backbone has its stride in the 3x3 convolutions; the weights "
            "would fit and the feature maps be others. Set False"
        )
    if (frozen := model["BACKBONE"]["FREEZE_AT"]) > 0:
        what = "its stem" if frozen == 1 else f"its stem and {frozen - 1} stages"
        yield f"MODEL.BACKBONE.FREEZE_AT is {frozen}, which freezes {what}: the papers train all of it. Set 0"
    shape = {
        "DEPTH": network.depth,
        "NUM_GROUPS": network.groups,
        "WIDTH_PER_GROUP": network.width,
        "RES2_OUT_CHANNELS": network.channels // 8,
    }
    for key, value in shape.items():
        if resnets[key] != value:
            yield f"MODEL.RESNETS.{key} is {resnets[key]}, but the backbone is a {expected.architecture}: set {value}"
    weights = str(model["WEIGHTS"])
    if weights != expected.weights:
        yield _other_weights(weights, expected.weights)


def _other_weights(weights: str, expected: str) -> str:
    if not weights:
        said = "is empty: training would start from random weights"
    elif "ImageNetPretrained" in weights:
        said = f"is {weights}: supervised weights of ImageNet, not the backbone"
    elif "://" in weights:
        said = f"is {weights}: a whole detector that was trained with labels, not the backbone"
    else:
        said = f"is {weights}, which is not the converted backbone"
    return f"MODEL.WEIGHTS {said}. Leave it to this command ({expected})"


def _equal(found: Sequence[float], expected: Sequence[float]) -> bool:
    """Equal as far as people write these numbers down."""
    return len(found) == len(expected) and all(
        math.isclose(a, b, abs_tol=0.05) for a, b in zip(found, expected, strict=True)
    )
