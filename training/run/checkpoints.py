"""Checkpoints, written completely or not at all. `clove_hub.runs` finds and reads them.

A checkpoint is written under a name that starts with a dot, is flushed to the disk and then renamed, so that a folder
with a final name is complete even if the machine dies at that moment.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from clove_hub.runs import FORMAT, STATE_FILE, sha256

Tensors = Mapping[str, Mapping[str, Tensor]]
"""The tensors of each file (`model`, `optimizer`) by their names."""


def state_tensors(module: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """All tensors of an unwrapped module and its optimizer that a checkpoint saves.

    The optimizer's tensors go by the names of the parameters: `momentum.student.backbone.conv1.weight`.
    """
    moments = {
        f"{key}.{name}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }
    return {"model": module.state_dict(), "optimizer": moments}


def write(folder: Path, step: int, tensors: Tensors, state: Mapping[str, Any]) -> None:
    """Write the folder of a checkpoint, replacing a damaged one.

    Args:
        state: plain data for state.json; `format`, `step` and `files` are added.

    Raises:
        OSError: the disk is full, or a file cannot be written; nothing of it remains.
    """
    partial, damaged = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "damaged"))
    shutil.rmtree(partial, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _require_room(folder, tensors)
    try:
        partial.mkdir()
        sums = {}
        for name, content in tensors.items():
            path = partial / f"{name}.safetensors"
            save_tensors(path, content)
            sums[path.name] = sha256(path)
        document = {"format": FORMAT, "step": step, "files": sums, **state}
        (partial / STATE_FILE).write_text(json.dumps(document, indent=1), encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            _flush(path)
        if folder.exists():
            shutil.rmtree(damaged, ignore_errors=True)
            folder.rename(damaged)
        partial.rename(folder)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(damaged, ignore_errors=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; failures of the system are an OSError with the path."""
    path.touch()
    mode = path.stat().st_mode  # by the umask; safetensors 0.8 leaves the file to its owner alone
    try:
        save_file({key: value.detach().contiguous() for key, value in tensors.items()}, path)
    except SafetensorError as error:
        if (found := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
    path.chmod(mode)


def restore(folder: Path, module: nn.Module, optimizer: Optimizer) -> None:
    """Load a checkpoint into a module and its optimizer; every tensor must match."""
    module.load_state_dict(load_file(folder / "model.safetensors"))
    parameters = dict(module.named_parameters())
    for full, value in load_file(folder / "optimizer.safetensors").items():
        key, _, name = full.partition(".")
        if name not in parameters:
            raise ValueError(f"the optimizer's {full} in the checkpoint belongs to no parameter that is trained here")
        like = parameters[name] if value.shape == parameters[name].shape else value
        target = torch.empty_like(like, dtype=value.dtype, memory_format=torch.preserve_format)
        optimizer.state[parameters[name]][key] = target.copy_(value)


def not_finite(tensors: Tensors) -> list[str]:
    """The names of tensors that hold non-finite values."""
    flat = {name: value for content in tensors.values() for name, value in content.items()}
    return [name for name, value in flat.items() if value.is_floating_point() and not value.isfinite().all()]


def _require_room(folder: Path, tensors: Tensors) -> None:
    needed = sum(value.nbytes for content in tensors.values() for value in content.values())
    if (free := shutil.disk_usage(folder.parent).free) < needed:
        room = f"a checkpoint needs {needed / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free"
        raise OSError(errno.ENOSPC, room, str(folder))


def _flush(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # which Python leaves out
    finally:
        os.close(descriptor)
