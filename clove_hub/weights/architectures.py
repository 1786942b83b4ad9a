"""What timm knows about an architecture, without making its weights."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Any

import timm
import torch


@dataclass(frozen=True)
class Architecture:
    """A headless timm model and the facts that timm needs to give it a head or another first layer."""

    name: str
    """Without a tag: `resnet50`."""
    shapes: dict[str, tuple[int, ...]]
    """Of every tensor of the model without classifier."""
    dtypes: dict[str, torch.dtype]
    parameters: int
    """How many numbers training adjusts; running statistics are not among them."""
    num_features: int
    global_pool: str
    input_size: int
    """Side in pixels that timm's own weights were trained with."""
    pool_size: tuple[int, int] | None
    """Of the last feature map at that input size."""
    fixed_input_size: bool
    first_conv: str | tuple[str, ...] | None
    classifier: str | tuple[str, ...] | None

    def pool_size_at(self, size: int) -> list[int] | None:
        """Height and width of the last feature map of an image with this side in pixels."""
        if self.pool_size is None:
            return None
        return [math.ceil(side * size / self.input_size) for side in self.pool_size]


def architecture(name: str) -> Architecture:
    """Asks timm about one of its architectures.

    Raises:
        ValueError: timm does not know it; the message names those with similar names.
    """
    name = name.partition(".")[0]  # a tag names weights, and these are others
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            f"{name!r} is no architecture of timm {timm.__version__}"
            f"{', did you mean ' + ' or '.join(near) + '?' if near else ''} (a newer timm may know it)"
        )
    with torch.device("meta"):  # names and shapes, no memory
        model: Any = timm.create_model(name, num_classes=0)
    state = model.state_dict()
    cfg = model.pretrained_cfg
    pool = getattr(model, "global_pool", None)
    return Architecture(
        name=name,
        shapes={key: tuple(tensor.shape) for key, tensor in state.items()},
        dtypes={key: tensor.dtype for key, tensor in state.items()},
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_features=model.num_features,
        global_pool=pool if isinstance(pool, str) and pool else "avg",
        input_size=cfg["input_size"][-1],
        pool_size=cfg.get("pool_size"),
        fixed_input_size=bool(cfg.get("fixed_input_size")),
        first_conv=cfg.get("first_conv"),
        classifier=cfg.get("classifier"),
    )
