"""Made-up runs and checkpoints in the shapes of real ones, for the tests of zoo, export and conversion."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def trained(architecture: str) -> nn.Module:
    """A headless timm model none of whose tensors has the value it would have without loading."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(architecture, num_classes=0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(1234)
            elif tensor.ndim == 1:  # norms and biases: about 1 where they scale, about 0 where they shift
                scales = name.endswith(("weight", "running_var"))
                tensor.normal_(0.0, 0.1).add_(1.0 if scales else 0.0).abs_()
    return model.eval()


def write_run(run: Path, architecture: str, steps: tuple[int, ...] = (10,), **changes: Any) -> nn.Module:
    """A run's folder as training leaves it; returns the backbone that it holds (at every step)."""
    model = trained(architecture)
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("method: {name: clove}\n")
    for step in steps:
        write_checkpoint(run / "checkpoints" / f"step_{step:08d}", model.state_dict(), architecture, step, **changes)
    return model


def write_checkpoint(
    folder: Path, backbone: Mapping[str, Tensor], architecture: str, step: int, **changes: Any
) -> None:
    """A complete checkpoint: the backbone as the exported encoder's, and as little as possible around it."""
    folder.mkdir(parents=True)
    exported = changes.get("exported", "student")
    other = "teacher" if exported == "student" else "student"
    method = {f"{exported}.backbone.{name}": tensor.contiguous() for name, tensor in backbone.items()}
    method |= {f"{exported}.projector.linear1.weight": torch.ones(2), f"{other}.backbone.bias": torch.ones(2)}
    save_file(method, folder / "model.safetensors")
    save_file({"momentum.conv1.weight": torch.ones(2)}, folder / "optimizer.safetensors")
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    state = {
        "format": 1,
        "step": step,
        "files": sums,
        "epoch": 3,
        "steps_total": 40,
        "finished": False,
        "images_seen": step * 16,
        "method": "clove",
        "exported": "student",
        "backbone": architecture,
        "preprocessing": {"size": 64, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "data": {"name": "/home/somebody/photos", "fingerprint": "c0ffee", "images": 160},
        "versions": {"clove_hub": "0.1.0", "torch": "2.6"},
        "grad_scaler": None,
        "hardware": "1 x CPU",
        "recipe": {
            "method": {"name": "clove", "global_size": 64},
            "data": {"path": "/home/somebody/photos", "source": "folder"},
            "batch": {"total": 16},
        },
    }
    (folder / "state.json").write_text(json.dumps(state | changes))


def released_clove(architecture: str = "resnet18", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The state dict of the released code's model, heads made small: its names, no two tensors alike."""
    torch.manual_seed(1)
    backbone = timm.create_model(architecture, num_classes=0)
    projector = nn.ModuleDict(
        {
            "linear1": nn.Conv2d(backbone.num_features, 24, 1, bias=False),
            "bn1": nn.BatchNorm2d(24),
            "linear2": nn.Conv2d(24, 16, 1, bias=False),
            "bn2": nn.BatchNorm2d(16, affine=False),
        }
    )
    parts = {
        "encoder": backbone,
        "projector": projector,
        "self_attn": nn.MultiheadAttention(16, 8, batch_first=True),
        "encoder_k": backbone,
        "projector_k": projector,
    }
    return {
        f"module.{part}.{name}": torch.randn(tensor.shape).to(dtype) if tensor.is_floating_point() else tensor.clone()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def save_released(path: Path, model: Mapping[str, Tensor]) -> None:
    """As the released code saves it: options in a Namespace, the optimiser's state beside the model."""
    momentum = {
        "state": {0: {"momentum_buffer": torch.ones(3)}},
        "param_groups": [{"lr": 1.0, "params": [0]}],
    }
    options = argparse.Namespace(arch="resnet50", batch_size=32, crop=0.2, local_rank=0)
    torch.save({"opt": options, "model": dict(model), "optimizer": momentum, "scaler": {}, "epoch": 400}, path)
