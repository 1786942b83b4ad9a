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

from clove_hub.runs import FORMAT, checkpoint_folders, sha256


def save(
    run: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    failed: bool = False,
) -> Path:
    """Writes the checkpoint of `step` and returns its folder.

    Args:
        run: the run's folder.
        step: optimizer steps done.
        tensors: for each file (`model`, `optimizer`) its tensors by name.
        state: plain data for state.json; `format`, `step` and `files` are added.
        failed: the state of a run that failed, for inspection; it is never resumed from.
    """
    folder = checkpoint_folder(run, step, failed)
    if folder.is_dir():  # the same step of the same run: the same bytes
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    sums = {}
    for name, content in tensors.items():
        path = partial / f"{name}.safetensors"
        save_file({key: value.detach().contiguous() for key, value in content.items()}, path)
        sums[path.name] = sha256(path)
    document = {"format": FORMAT, "step": step, "files": sums, **state}
    (partial / "state.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    for path in [*partial.iterdir(), partial]:
        flush(path)
    partial.rename(folder)
    flush(folder.parent)
    return folder


def save_from_main(
    accelerator: Accelerator,
    run: Path,
    step: int,
    module: nn.Module,
    optimizer: Optimizer,
    state: Mapping[str, Any],
    keep: int,
    failed: bool = False,
) -> Path:
    """Writes the checkpoint of `step` in the main process, while the others wait, and removes old ones.

    Args:
        module: not wrapped, as `restore` takes it; the optimizer too.
        keep: how many of the newest checkpoints stay.

    Returns:
        The checkpoint's folder.
    """
    if accelerator.is_main_process:
        tensors = {"model": module.state_dict(), "optimizer": optimizer_tensors(optimizer, module)}
        save(run, step, tensors, state, failed)
        prune(run, keep)
    accelerator.wait_for_everyone()
    return checkpoint_folder(run, step, failed)


def checkpoint_folder(run: Path, step: int, failed: bool = False) -> Path:
    return run / "checkpoints" / f"{'failed' if failed else 'step'}_{step:08d}"


def prune(run: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what interrupted writes have left."""
    folder = run / "checkpoints"
    for path in [*checkpoint_folders(run)[keep:], *folder.glob(".*.partial")]:
        shutil.rmtree(path)


def restore(folder: Path, module: nn.Module, optimizer: Optimizer) -> None:
    """Brings a module and its optimizer to where the checkpoint left them; every tensor must find its place."""
    module.load_state_dict(read_tensors(folder, "model"))
    restore_optimizer(optimizer, module, read_tensors(folder, "optimizer"))


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


def optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's tensors by the names of the parameters: `momentum.student.backbone.conv1.weight`."""
    return {
        f"{key}.{name}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def restore_optimizer(optimizer: Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; every tensor must find its parameter."""
    parameters = dict(module.named_parameters())
    for full, value in tensors.items():
        key, _, name = full.partition(".")
        if name not in parameters:
            raise ValueError(f"the optimizer's {full} in the checkpoint belongs to no parameter that is trained here")
        like = parameters[name] if value.shape == parameters[name].shape else value
        target = torch.empty_like(like, dtype=value.dtype, memory_format=torch.preserve_format)
        optimizer.state[parameters[name]][key] = target.copy_(value)


def flush(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
