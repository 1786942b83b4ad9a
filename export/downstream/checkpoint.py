"""Checkpoints of a fine-tuning run: written whole or not at all, and read back only if whole.

RUN/checkpoints/step_00001000/model.safetensors        the whole network
RUN/checkpoints/step_00001000/optimizer.safetensors    `weight.momentum_buffer` of each parameter
RUN/checkpoints/step_00001000/state.json               step, what the run is, and the sums of the other files
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from clove_hub.runs import checkpoint_folders, sha256

FORMAT = 1
log = logging.getLogger(__name__)


def save(run: Path, step: int, network: nn.Module, optimizer: Optimizer, facts: Mapping[str, Any], keep: int) -> None:
    """Writes the checkpoint of `step`, and removes all but the newest `keep`."""
    momentum = {
        f"{name}.{key}": value
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }
    folder = run / "checkpoints" / f"step_{step:08d}"
    partial = folder.with_name(f".{folder.name}.partial")
    for leftover in folder.parent.glob(".*.partial"):
        shutil.rmtree(leftover)
    if folder.is_dir():  # the same step of the same run: the same bytes
        return
    partial.mkdir(parents=True)
    for name, tensors in (("model", network.state_dict()), ("optimizer", momentum)):
        contiguous = {key: value.detach().contiguous() for key, value in tensors.items()}
        save_file(contiguous, partial / f"{name}.safetensors")
    sums = {path.name: sha256(path) for path in partial.iterdir()}
    document = {"format": FORMAT, "step": step, "files": sums, **facts}
    (partial / "state.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    for path in [*partial.iterdir(), partial]:
        _flush(path)
    partial.rename(folder)
    _flush(folder.parent)
    for old in checkpoint_folders(run)[keep:]:
        shutil.rmtree(old)


def newest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its state; damaged ones are passed over with a warning.

    Raises:
        ValueError: there are checkpoints, but none of them is whole.
    """
    folders = checkpoint_folders(run)
    for folder in folders:
        try:
            state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if state["format"] != FORMAT:
                raise ValueError(f"format {state['format']}, expected {FORMAT}")
            if damaged := [name for name, digest in state["files"].items() if sha256(folder / name) != digest]:
                raise ValueError(f"{', '.join(damaged)} changed since it was written")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("passing over the damaged checkpoint %s: %s", folder, error)
        else:
            return folder, state
    if folders:
        raise ValueError(f"{run} has {len(folders)} checkpoints and none is whole: remove {run / 'checkpoints'}")
    return None


def restore(folder: Path, network: nn.Module, optimizer: Optimizer) -> None:
    """Brings network and optimiser to where the checkpoint left them; every tensor must find its place."""
    network.load_state_dict(load_file(folder / "model.safetensors"))
    parameters = dict(network.named_parameters())
    for full, value in load_file(folder / "optimizer.safetensors").items():
        name, _, key = full.rpartition(".")
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the rows after `step`, which the run is going to write again, and a half-written last one."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
        path.write_text("".join(kept), encoding="utf-8")


def _flush(path: Path) -> None:
    """Has the disk hold what was written to a file, or to a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
