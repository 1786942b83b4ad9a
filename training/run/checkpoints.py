"""Checkpoints, written whole or not at all. `clove_hub.runs` finds and reads them.

A checkpoint is written under a name that starts with a dot, is flushed to the disk and then renamed, so that a folder
with a final name is complete even if the machine dies at that moment.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from clove_hub.runs import FORMAT, STATE_FILE, checkpoint_folders, sha256


def save(
    accelerator: Accelerator,
    run: Path,
    step: int,
    module: nn.Module,
    optimizer: Optimizer,
    state: Mapping[str, Any],
    keep: int,
    failed: bool = False,
) -> Path:
    """Writes a checkpoint in the main process, while the others wait, and removes old ones; returns its folder.

    The optimizer's tensors go by the names of the parameters: `momentum.student.backbone.conv1.weight`.

    Args:
        run: the run's folder.
        step: optimizer steps done.
        module: not wrapped, as `restore` takes it; the optimizer too.
        state: plain data for state.json; `format`, `step` and `files` are added.
        keep: how many of the newest checkpoints stay.
        failed: the state of a run that failed, for inspection; it is never resumed from.
    """
    folder = run / "checkpoints" / f"{'failed' if failed else 'step'}_{step:08d}"
    if accelerator.is_main_process:
        if not folder.is_dir():  # if it is: the same step of the same run, the same bytes
            moments = {
                f"{key}.{name}": value
                for name, parameter in module.named_parameters()
                for key, value in optimizer.state.get(parameter, {}).items()
                if value is not None
            }
            write(folder, step, {"model": module.state_dict(), "optimizer": moments}, state)
        for path in [*checkpoint_folders(run)[keep:], *folder.parent.glob(".*.partial")]:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()
    return folder


def write(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Writes the folder of a checkpoint: `tensors` by name for each file (`model`, `optimizer`), and state.json."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    sums = {}
    for name, content in tensors.items():
        path = partial / f"{name}.safetensors"
        save_file({key: value.detach().contiguous() for key, value in content.items()}, path)
        sums[path.name] = sha256(path)
    document = {"format": FORMAT, "step": step, "files": sums, **state}
    (partial / STATE_FILE).write_text(json.dumps(document, indent=1), encoding="utf-8")
    for path in [*partial.iterdir(), partial]:
        _flush(path)
    partial.rename(folder)
    _flush(folder.parent)


def restore(folder: Path, module: nn.Module, optimizer: Optimizer) -> None:
    """Brings a module and its optimizer to where the checkpoint left them; every tensor must find its place."""
    module.load_state_dict(load_file(folder / "model.safetensors"))
    parameters = dict(module.named_parameters())
    for full, value in load_file(folder / "optimizer.safetensors").items():
        key, _, name = full.partition(".")
        if name not in parameters:
            raise ValueError(f"the optimizer's {full} in the checkpoint belongs to no parameter that is trained here")
        like = parameters[name] if value.shape == parameters[name].shape else value
        target = torch.empty_like(like, dtype=value.dtype, memory_format=torch.preserve_format)
        optimizer.state[parameters[name]][key] = target.copy_(value)


def _flush(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
