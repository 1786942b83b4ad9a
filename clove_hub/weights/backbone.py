"""A backbone as a model that returns feature maps of any level."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clove_hub.backbones import feature_map, intermediate_maps, levels
from clove_hub.geometry import upsampled
from clove_hub.global_state import kept_generators

from .source import load
from .weights import Preprocessing, Weights

log = logging.getLogger(__name__)

PAD = 32
"""Feature maps are made of images padded to a multiple of this, or of a cell where that does not divide it."""


Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Backbone:
    """A timm model without a classifier, in eval mode."""

    model: nn.Module
    preprocessing: Preprocessing
    name: str
    weights: Weights | None = None
    """What it was loaded from, with fingerprint and architecture; None of a model in memory."""
    precision: Precision = "fp32"
    """Whether the forward pass is mixed with bfloat16; features are float32 in any case."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def maps(self, pixels: Tensor, chosen: Sequence[int] = (-1,)) -> list[Tensor]:
        """Feature maps (B, C, h, w) of some levels of normalized images (B, 3, H, W).

        Args:
            chosen: -1 is the last (layer4 of a ResNet), -2 the one before, and so on.

        Raises:
            ValueError: the model has no such level, takes no image of this size, or returns non-finite values.
        """
        pixels = pixels.to(self.device, next(self.model.parameters()).dtype)
        count = levels(self.model)
        if wrong := [level for level in chosen if not -count <= level < 0]:
            raise ValueError(f"{self.name} has {count} feature levels, -1 (the last) to {-count}; asked for {wrong[0]}")
        try:
            with self._mixed():
                maps = [one.float() for one in intermediate_maps(self.model, pixels, chosen)]
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError) as error:
            height, width = pixels.shape[-2:]
            raise ValueError(f"{self.name} cannot take images of {width}x{height} pixels: {error}") from error
        return [finite(one, self.name) for one in maps]

    def joined(self, pixels: Tensor, chosen: Sequence[int]) -> Tensor:
        """Levels concatenated to one map, resized to the finest bilinearly: (B, 3, H, W) -> (B, C, h, w).

        Args:
            chosen: as in `maps`; C is the sum of their channels.

        Raises:
            ValueError: as `maps`.
        """
        return side_by_side(self.maps(pixels, chosen))

    @property
    def multiple(self) -> int:
        """Pixels of which both sides of an image should be a multiple, so that each cell covers a whole number of them."""
        info = getattr(self.model, "feature_info", None) or [{}]
        cell = int(dict(info[-1]).get("reduction") or PAD)
        return cell if PAD % cell and cell % PAD else PAD

    def padded(self, pixels: Tensor) -> Tensor:
        """Pad images (B, C, H, W) to whole cells by repeating the last column and row."""
        return padded(pixels, self.multiple)

    def pooled(self, pixels: Tensor) -> Tensor:
        """The input of the classifier: (B, 3, H, W) -> (B, C).

        Raises:
            ValueError: the model gives values that are not finite.
        """
        with self._mixed():
            features: Tensor = self.model(pixels.to(self.device, next(self.model.parameters()).dtype)).float()
        return finite(features.mean((2, 3)) if features.ndim == 4 else features, self.name)

    def unpooled(self, pixels: Tensor) -> Tensor:
        """The input of the pooling before the classifier, as a map: (B, 3, H, W) -> (B, C, h, w).

        For an EfficientNet, it is the map after the last level; for a model without a map there, the last level.

        Raises:
            ValueError: the model gives values that are not finite.
        """
        with self._mixed():
            features = feature_map(self.model, pixels.to(self.device, next(self.model.parameters()).dtype)).float()
        return finite(features, self.name) if features.ndim == 4 else self.maps(pixels)[0]

    def _mixed(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def side_by_side(maps: Sequence[Tensor]) -> Tensor:
    """Concatenate maps of several levels (B, C, h, w), resized to the finest bilinearly."""
    size = max(((one.shape[2], one.shape[3]) for one in maps), key=lambda sides: sides[0] * sides[1])
    return torch.cat([one if one.shape[2:] == size else upsampled(one, size) for one in maps], 1)


def finite(features: Tensor, name: str) -> Tensor:
    """Return the features after checking that they are finite. Synchronizes with the device.

    Args:
        name: of the model, for the message.

    Raises:
        ValueError: there are such values.
    """
    if not bool(features.isfinite().all()):
        raise ValueError(
            f"{name} gives non-finite features, although its weights are finite: they come from a training that diverged, or "
            "are too large for the precision. Use an earlier checkpoint or a higher precision"
        )
    return features


def padded(pixels: Tensor, multiple: int = PAD) -> Tensor:
    """Pad (B, C, H, W) to a multiple of `multiple` by repeating the last column and row."""
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % multiple, 0, -height % multiple), mode="replicate")


@kept_generators()
def load_backbone(source: str | Path, *, seed: int = 0) -> Backbone:
    """Load a backbone on the CPU; whatever was left out or assumed is logged as a warning.

    Args:
        source: as in `load`.
        seed: of the weights of `random:`.

    Raises:
        ValueError: as `load`.

    Examples:
        >>> import clove_hub, torch
        >>> backbone = clove_hub.load_backbone("random:test_resnet")
        >>> [tuple(one.shape) for one in backbone.maps(torch.zeros(1, 3, 64, 64))]
        [(1, 96, 2, 2)]
    """
    weights = load(source, seed=seed)
    for note in weights.notes:
        log.warning("%s: %s", weights.what, note)
    return Backbone(weights.build().requires_grad_(False), weights.preprocessing, weights.name, weights)


# ---- levels, and a finer map of a ResNet -----------------------------------------------------------------------------


def nearest_level(model: nn.Module, cell: int) -> int:
    """The last of the feature levels whose cells are nearest to `cell` pixels wide; the last if timm gives no sizes."""
    info = [int(dict(one).get("reduction") or 0) for one in getattr(model, "feature_info", None) or []]
    if not info or not all(info) or len(info) != levels(model):
        return -1
    distances = [abs(math.log(found / cell)) for found in info]
    return max(number for number, distance in enumerate(distances) if distance == min(distances)) - len(info)


def is_plain_resnet(model: nn.Module) -> bool:
    """Whether a model is a ResNet of plain blocks, as timm's and torchvision's resnet18 to resnet152 are."""
    return bool(_strided(model, "layer4"))


def with_stride_one(model: nn.Module, stage: str, dilated: bool = True) -> nn.Module:
    """A copy of a ResNet whose stage keeps the resolution of its input.

    Args:
        stage: `layer3` or `layer4`.
        dilated: whether to keep the receptive field: as in dilated networks (Yu and Koltun 2016), and as timm builds
            them with `output_stride`, the 3x3 convolutions after the first block are dilated by 2. Otherwise only
            strides become 1.

    Raises:
        ValueError: the model is not a ResNet of plain blocks.
    """
    model = copy.deepcopy(model)
    strided = _strided(model, stage)
    if not strided:
        raise ValueError(
            f"{type(model).__name__} is not a ResNet of plain blocks, whose {stage} could be given a finer map; "
            "torchvision's and timm's resnet18 to resnet152 are"
        )
    for conv in strided:
        conv.stride = (1, 1)
    if dilated:
        for layer in getattr(
            model, stage
        ).modules():  # the 3x3 convolution that had the stride saw the finer map already
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) and layer not in strided:
                layer.dilation = layer.padding = (2, 2)
    return model


def _strided(model: nn.Module, stage: str) -> list[nn.Conv2d]:
    """The two convolutions by which a stage of a plain ResNet halves its map; empty for any other network."""
    blocks = getattr(model, stage, None)
    layers = list(blocks.modules()) if isinstance(blocks, nn.Sequential) else []
    strided = [layer for layer in layers if isinstance(layer, nn.Conv2d) and layer.stride != (1, 1)]
    plain = len(strided) == 2 and not any(isinstance(layer, nn.AvgPool2d | nn.MaxPool2d) for layer in layers)
    return strided if plain else []
