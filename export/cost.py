"""The cost of one image for a backbone, counted as in timm's tables: GMACs and activations."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from clove_hub.backbones import build_model

_aten = torch.ops.aten
PRODUCTS = (_aten.convolution, _aten.addmm, _aten.mm, _aten.bmm, _aten.baddbmm)
"""The operations that count: convolutions and matrix products, those of attention included."""


@dataclass(frozen=True)
class Cost:
    """Of one forward pass with one image."""

    macs: int
    """Multiplications with addition. timm's table counts those of norms too, 0.5% more for a ResNet."""
    activations: int
    """Values that the operations put out."""


def cost(architecture: str, size: int, model_args: Mapping[str, Any] | None = None) -> Cost:
    """Counts on torch's meta device, where nothing is computed.

    Args:
        architecture: a model of timm, counted without its classifier.
        size: side of the image in pixels.
        model_args: further arguments of `timm.create_model`.
    """
    return _cost(architecture, size, json.dumps(model_args or {}))


@cache
def _cost(architecture: str, size: int, model_args: str) -> Cost:

    def outputs(*_: Any, out_shape: tuple[int, ...], **__: Any) -> int:
        return math.prod(out_shape)

    with torch.device("meta"):
        args = json.loads(model_args)
        model = build_model(architecture, args).eval().requires_grad_(False)
        image = torch.empty(1, args.get("in_chans", 3), size, size)
    flops = FlopCounterMode(display=False)
    activations = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(PRODUCTS, outputs))
    with flops, activations:
        model(image)

    def total(counter: FlopCounterMode) -> int:
        found = counter.get_flop_counts().get("Global", {})
        return sum(found.get(operation, 0) for operation in PRODUCTS)

    return Cost(macs=total(flops) // 2, activations=total(activations))
