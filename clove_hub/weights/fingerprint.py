"""What identifies weights; and the backbone that is fine-tuned, from whatever `load_source` reads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from clove_hub.weights.backbone import load_backbone

from .sources import Source, load_source


def find_backbone(source: str, seed: int) -> Source:
    """What `load_source` reads; and, to compare with, models of timm (`resnet50.a1_in1k`) and `random:resnet50`.

    Args:
        seed: of random weights.

    Raises:
        ValueError: it is none of these.
    """
    if source.startswith("random:") or (timm.is_model(source.partition(".")[0]) and not Path(source).exists()):
        backbone = load_backbone(source, seed)
        seen = backbone.preprocessing
        name = source.removeprefix("random:").partition(".")[0]
        return Source(source, name, dict(backbone.model.state_dict()), seen.mean, seen.std)
    return load_source(source)


def fingerprint(architecture: str, tensors: Mapping[str, Tensor]) -> str:
    """64 hexadecimal digits that change with the architecture and with any value of the weights.

    They are the same wherever the weights are: in a file, in a run, in memory, on any device. What was stored with 16 bits
    counts as the float32 values that a model built from it has. The normalization of images is not part of it: it
    belongs to the preprocessing.

    Args:
        architecture: the name in timm, without a tag.
        tensors: of the backbone without a classifier, by timm's names, in any order.
    """
    digest = hashlib.sha256(architecture.encode())
    for name, tensor in sorted(tensors.items()):
        values = (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        digest.update(f"\0{name}\0{values.dtype}\0{list(values.shape)}\0".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def architecture_of(model: nn.Module) -> str:
    """The name in timm of a model in memory, without a tag; the class's name for one that timm did not make."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)
