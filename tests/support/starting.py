"""Weights to begin with, as timm's own tools write them."""

from pathlib import Path

import timm
import torch
from timm.models import save_for_hf


def saved(folder: Path, name: str, **cfg: object) -> Path:
    """A model with random weights, as timm's own `save_for_hf` writes it."""
    torch.manual_seed(7)
    model = timm.create_model(name, num_classes=10)
    for parameter in model.parameters():  # as training leaves none at zero
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    model.pretrained_cfg |= cfg
    save_for_hf(model, folder, model_config={"num_classes": 10}, safe_serialization=True)
    return folder
