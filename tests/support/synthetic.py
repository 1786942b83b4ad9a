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


RELEASED = {
    # Each as its authors save it: what the names begin with, and what is in the file beside the tensors.
    "clove": ("module.", lambda t: {"opt": options(t), "model": t, "optimizer": MOMENTUM, "scaler": {}, "epoch": 400}),
    "slotcon": (
        "module.",
        lambda t: {
            "args": options(t, batch_size=64, world_size=8),
            "model": t,
            "optimizer": MOMENTUM,
            "scheduler": {"T_max": 3},
        },
    ),
    "slotcon_backbone": ("module.", lambda t: {"state_dict": t}),
    "pixpro": ("module.", lambda t: {"model": t}),
    "pixpro_instance": ("module.", lambda t: {"model": t}),
    "moco": ("module.", lambda t: {"epoch": 800, "arch": options(t).arch, "state_dict": t, "optimizer": MOMENTUM}),
    "moco_query": ("module.", lambda t: {"state_dict": t}),
    "moco_knn": ("module.", lambda t: {"epoch": 200, "state_dict": t}),
    "resim": ("module.", lambda t: {"epoch": 400, "state_dict": t}),
    "densecl": ("", lambda t: {"meta": {"epoch": 200}, "state_dict": t, "optimizer": MOMENTUM}),
    "detco": ("", lambda t: {"state_dict": t, "author": "OpenSelfSup"}),
    "vicreg": ("", lambda t: t),
    "vicreg_full": ("module.", lambda t: {"epoch": 1000, "model": t, "optimizer": MOMENTUM}),
    "vicregl_full": ("module.", lambda t: {"epoch": 300, "model": t}),
    "byol": ("", lambda t: t),
    "byol_mmselfsup": ("", lambda t: {"state_dict": t}),
    "byol_solo": ("", lambda t: {"state_dict": t, "epoch": 400}),
    "swav": ("module.", lambda t: t),
    "torchvision": ("", lambda t: t),
    "timm": ("", lambda t: t),
    "detectron2": ("", lambda t: {"model": t, "__author__": "MOCO", "matching_heuristics": True}),
}
"""Kinds of released files."""
TWICE = {"densecl": ("backbone.", "encoder_q.0."), "byol": ("net.", "online_encoder.net.")}
"""Files in which the student's backbone has two names."""
MOMENTUM = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 1.0, "params": [0]}]}


def options(tensors: Mapping[str, Tensor], **more: int) -> argparse.Namespace:
    """Those of a training, among which the architecture is: of the two that the tests are made with."""
    arch = "resnet50" if any("layer1.0.conv3" in name for name in tensors) else "resnet18"
    return argparse.Namespace(**{"arch": arch, "batch_size": 32, "crop": 0.2, "local_rank": 0, **more})


def released_tensors(
    kind: str, architecture: str = "resnet18", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The tensors of a released file, heads made small: its names, no two tensors alike unless they are one."""
    torch.manual_seed(1)
    prefix, _ = RELEASED[kind]
    tensors = {}
    for part, module in _parts(kind, architecture).items():
        state = {part: module} if isinstance(module, Tensor) else module.state_dict(prefix=part)
        tensors |= {
            f"{prefix}{name}": torch.randn(t.shape).to(dtype) if t.is_floating_point() else t
            for name, t in state.items()
        }
    tensors = {name: t.abs() if name.endswith("running_var") else t for name, t in tensors.items()}
    if kind in TWICE:
        second, first = TWICE[kind]
        tensors |= {second + name[len(first) :]: t for name, t in tensors.items() if name.startswith(first)}
    if kind == "detectron2":
        return {_detectron2_name(name): tensor for name, tensor in tensors.items()}
    return tensors


def save_released(path: Path, kind: str, tensors: Mapping[str, Tensor], zipped: bool = True) -> None:
    """As its authors save it: options in a Namespace, the optimizer's state beside the model, or whatever they do."""
    _, content = RELEASED[kind]
    torch.save(content(dict(tensors)), path, _use_new_zipfile_serialization=zipped)


def _parts(kind: str, architecture: str) -> dict[str, nn.Module | Tensor]:
    """The modules and buffers of the released models, by what their names begin with.

    Written down from their papers and from what is known of their names, not from the table that is tested with them.
    """
    backbone = timm.create_model(architecture, num_classes=0)
    channels = backbone.num_features

    def conv(into: int, out: int, bias: bool = True) -> nn.Module:
        return nn.Conv2d(into, out, 1, bias=bias)

    def mlp(into: int, layer: Any) -> nn.Module:  # SlotCon's heads
        hidden = nn.Sequential(layer(into, 24), nn.BatchNorm1d(24), nn.GELU(), layer(24, 24), nn.BatchNorm1d(24))
        return nn.ModuleDict({"mlp": nn.Sequential(*hidden, nn.GELU(), layer(24, 16))})

    def dense(bias: bool, into: int = channels) -> nn.Module:  # those of PixPro and CLoVE
        layers = {"linear1": conv(into, 24, bias), "bn1": nn.BatchNorm2d(24), "linear2": conv(24, 16, bias)}
        return nn.ModuleDict(layers if bias else layers | {"bn2": nn.BatchNorm2d(16, affine=False)})

    def pooled() -> nn.Module:
        return nn.Sequential(nn.Linear(channels, 24), nn.ReLU(), nn.Linear(24, 16))

    def neck() -> nn.Module:
        cells = nn.Sequential(conv(channels, 24), nn.ReLU(), conv(24, 16))
        return nn.ModuleDict({"mlp": pooled(), "mlp2": cells})

    def expander() -> nn.Module:
        hidden = [nn.Linear(channels, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24), nn.BatchNorm1d(24)]
        return nn.Sequential(*hidden, nn.ReLU(), nn.Linear(24, 24, bias=False))

    keys, place = torch.zeros(16, 32), torch.zeros(1, dtype=torch.long)
    moco = {
        "queue": keys,
        "queue_ptr": place,
        "encoder_q.": backbone,
        "encoder_q.fc.": pooled(),
        "encoder_k.": backbone,
        "encoder_k.fc.": pooled(),
    }
    pyramid = {"fpn_lateral5": conv(channels, 16), "fpn_output4": nn.Conv2d(16, 16, 3)}
    pixpro = {
        "encoder.": backbone,
        "projector.": dense(bias=True),
        "encoder_k.": backbone,
        "projector_k.": dense(bias=True),
        "value_transform.": conv(16, 16),
    }
    parts: dict[str, dict[str, nn.Module | Tensor]] = {
        "clove": {
            "encoder.": backbone,
            "projector.": dense(bias=False),
            "self_attn.": nn.MultiheadAttention(16, 8, batch_first=True),
            "encoder_k.": backbone,
            "projector_k.": dense(bias=False),
        },
        "slotcon": {
            "center": torch.zeros(1, 256),
            "encoder_q.": backbone,
            "encoder_k.": backbone,
            "projector_q.": mlp(channels, conv),
            "projector_k.": mlp(channels, conv),
            "grouping_q.slot_embed.": nn.Embedding(256, 16),
            "grouping_k.slot_embed.": nn.Embedding(256, 16),
            "predictor_slot.": mlp(16, nn.Linear),
        },
        "slotcon_backbone": {"encoder_k.": backbone},
        "pixpro": pixpro,
        "pixpro_instance": pixpro
        | {
            "projector_instance.": dense(bias=True),
            "projector_instance_k.": dense(bias=True),
            "predictor.": dense(bias=True, into=16),
        },
        "moco": moco,
        "moco_query": {"encoder_q.": backbone, "encoder_q.fc.": pooled()},
        "moco_knn": moco | {"queue_backbone": torch.zeros(channels, 32)},
        "resim": moco | {f"encoder_{e}.{name}.": layer for e in "qk" for name, layer in pyramid.items()},
        "densecl": {
            "queue": keys,
            "queue_ptr": place,
            "queue2": keys,
            "queue2_ptr": place,
            "encoder_q.0.": backbone,
            "encoder_q.1.": neck(),
            "encoder_k.0.": backbone,
            "encoder_k.1.": neck(),
        },
        "vicreg_full": {"backbone.": backbone, "projector.": expander()},
        "vicregl_full": {"backbone.": backbone, "projector.": expander(), "maps_projector.": expander()},
        "byol": {
            "online_encoder.net.": backbone,
            "online_encoder.projector.": pooled(),
            "online_predictor.": pooled(),
            "target_encoder.net.": backbone,
            "target_encoder.projector.": pooled(),
        },
        "byol_mmselfsup": {
            "online_net.0.": backbone,
            "online_net.1.": pooled(),
            "target_net.0.": backbone,
            "target_net.1.": pooled(),
            "head.predictor.": pooled(),
        },
        "byol_solo": {
            "backbone.": backbone,
            "momentum_backbone.": backbone,
            "projector.": pooled(),
            "momentum_projector.": pooled(),
            "predictor.": pooled(),
            "classifier.": nn.Linear(channels, 10),
        },
        "swav": {"": backbone, "projection_head.": pooled(), "prototypes.": nn.Linear(16, 30, bias=False)},
        "torchvision": {"": backbone, "fc.": nn.Linear(channels, 10)},
    }
    return parts.get(kind, {"": backbone})


def _detectron2_name(name: str) -> str:
    """As the authors' converters rename: the only way in which names reach such a file."""
    name = name if "layer" in name else f"stem.{name}"
    for stage in (1, 2, 3, 4):
        name = name.replace(f"layer{stage}", f"res{stage + 1}")
    for layer in (1, 2, 3):
        name = name.replace(f"bn{layer}", f"conv{layer}.norm")
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
