"""Checkpoints: written whole or not at all, read back only if every byte is the one that was written.

A checkpoint is a folder `step_00001234` of safetensors files and one JSON file, which holds the sums of the others.
It comes into being under a name that starts with a dot, is flushed to the disk and then renamed, so that a folder
with a final name is complete even if the machine dies at that moment.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

FORMAT = 1
log = logging.getLogger(__name__)


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
        step: optimiser steps done.
        tensors: for each file (`model`, `optimizer`) its tensors by name.
        state: plain data for state.json; `format`, `step` and `files` are added.
        failed: the state of a run that went wrong, for looking at: it is never resumed from.
    """
    folder = run / "checkpoints" / f"{'failed' if failed else 'step'}_{step:08d}"
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
    (partial / "state.json").write_text(json.dumps({"format": FORMAT, "step": step, "files": sums, **state}, indent=1))
    for path in partial.iterdir():
        flush(path)
    flush(partial)
    partial.rename(folder)
    flush(folder.parent)
    return folder


def newest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its state; damaged ones are passed over with a warning.

    Raises:
        ValueError: there are checkpoints, but none of them is whole.
    """
    folders = sorted((run / "checkpoints").glob("step_*"), reverse=True)
    for folder in folders:
        try:
            return folder, read_state(folder)
        except ValueError as error:
            log.warning("passing over the damaged checkpoint %s: %s", folder, error)
    if folders:
        raise ValueError(
            f"none of the {len(folders)} checkpoints in {run / 'checkpoints'} is whole: "
            "remove that folder to start the run over, or choose another run.output"
        )
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """state.json, once the checkpoint's files have been found to be the ones that were written."""
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        files = state["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its state.json cannot be read ({error})") from error
    if state.get("format") != FORMAT:
        raise ValueError(f"it has format {state.get('format')!r}, this version reads {FORMAT}")
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if sha256(folder / name) != expected:
            raise ValueError(f"{name} is not what was written (its sha256 differs)")
    return state


def prune(run: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what interrupted writes have left."""
    folder = run / "checkpoints"
    for path in [*sorted(folder.glob("step_*"))[:-keep], *folder.glob(".*.partial")]:
        shutil.rmtree(path)


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


def optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimiser's tensors by the names of the parameters: `momentum.student.backbone.conv1.weight`."""
    return {
        f"{key}.{name}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; every tensor must find its parameter."""
    parameters = dict(module.named_parameters())
    for full, value in tensors.items():
        key, _, name = full.partition(".")
        if name not in parameters:
            raise ValueError(f"the optimiser's {full} in the checkpoint belongs to no parameter of this method")
        like = parameters[name] if value.shape == parameters[name].shape else value
        target = torch.empty_like(like, dtype=value.dtype, memory_format=torch.preserve_format)
        optimizer.state[parameters[name]][key] = target.copy_(value)


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the rows after `step`, which the run is going to write again, and a half-written last one."""
    if path.is_file():
        kept = [line for line in complete_lines(path) if json.loads(line)["step"] <= step]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(kept))
        flush(partial)
        partial.replace(path)


def complete_lines(path: Path) -> Iterator[str]:
    with path.open() as file:
        for line in file:
            if line.endswith("}\n"):
                yield line


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Has the disk hold what was written to a file, or to a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
