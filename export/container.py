"""The bytes of a file of converted weights: safetensors, a PyTorch checkpoint or a pickle, by framework."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from clove_hub.zoo.resnets import Format


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors: saving a view would store its entire underlying tensor."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def container(target: Format, suffix: str, tensors: dict[str, Tensor]) -> bytes:
    """The file's content: tensors and plain data, readable with `weights_only=True`, except for a `.pkl`."""
    if suffix == ".safetensors":
        return save(tensors, metadata={"format": "pt"})
    content: dict[str, Any] = tensors
    if target == "mmseg":
        content = {"state_dict": tensors, "meta": {}}
    if target == "detectron2":
        # The heuristics match the bare names of a backbone to those inside any detector.
        content = {"model": tensors, "__author__": "clove-hub", "matching_heuristics": True}
    if suffix == ".pkl":
        content["model"] = {name: tensor.numpy() for name, tensor in tensors.items()}
        return pickle.dumps(content, protocol=4)
    # To a buffer, not a file: torch.save writes the file's name into the file.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
