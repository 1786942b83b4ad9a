"""The backbone that is fine-tuned: whatever `load_source` reads, and what it is compared with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import timm
import torch

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


def fingerprint(source: Source) -> str:
    """64 hexadecimal digits that change with any value of the backbone, and with how its images are normalized."""
    digest = hashlib.sha256(json.dumps([source.architecture, list(source.mean), list(source.std)]).encode())
    for name, tensor in sorted(source.tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
