"""A run's checkpoint, as far as it is needed outside training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clove_hub.runs import checkpoint_folders, newest_checkpoint, read_state
from clove_hub.zoo.tensors import read_tensors


@dataclass(frozen=True)
class Preprocessing:
    """How the backbone saw images during training."""

    size: int
    """Side in pixels of the views that student and teacher shared."""
    mean: tuple[float, float, float]
    """Of red, green and blue, where white is 1."""
    std: tuple[float, float, float]


@dataclass(frozen=True)
class State:
    """What `state.json` says, as far as it is needed outside training."""

    step: int
    steps_total: int
    epoch: int
    finished: bool
    images_seen: int
    method: str
    exported: str
    """Which encoder leaves: `student` or `teacher`."""
    backbone: str
    """The architecture's name in timm."""
    preprocessing: Preprocessing
    data: Mapping[str, Any]
    """`name`, `fingerprint` and `images` of the image source."""
    hardware: str
    versions: Mapping[str, str]
    recipe: Mapping[str, Any]
    """Resolved: every default written out."""
    files: Mapping[str, str]
    """sha256 of each file of the checkpoint, by name."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of a run."""

    folder: Path
    state: State

    def backbone(self) -> dict[str, Tensor]:
        """The exported encoder's tensors, by timm's names.

        Raises:
            ValueError: there are none.
        """
        tensors, _ = read_tensors(self.folder / "model.safetensors")
        prefix = f"{self.state.exported}.backbone."
        backbone = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
        if not backbone:
            raise ValueError(
                f"{self.folder / 'model.safetensors'} holds no tensors under {prefix}* (found "
                f"{len(tensors)}, such as {', '.join(list(tensors)[:3])}), although its state.json names "
                f"{self.state.exported!r} as exported"
            )
        return backbone


def is_run(folder: Path) -> bool:
    """Whether training wrote this folder."""
    return (folder / "recipe.yaml").is_file() or (folder / "checkpoints").is_dir()


def find_checkpoint(run: Path, step: int | None = None) -> Checkpoint:
    """The newest checkpoint that is whole, with a warning for each newer one that is not; or that of `step`.

    Raises:
        ValueError: `run` is no run, has no complete checkpoint, none that is whole, or not the one asked for.
    """
    if not is_run(run):
        found = "it does not exist" if not run.exists() else "found neither recipe.yaml nor checkpoints/ in it"
        raise ValueError(f"{run} is not the folder of a run: {found}. Give the folder that run.output named.")
    folders = checkpoint_folders(run)
    if not folders:
        raise ValueError(
            f"{run} has no complete checkpoint (checkpoints/step_*): start its training again with the same "
            "recipe, it saves every run.save_every steps and when it is stopped"
        )
    if step is not None:
        chosen = [folder for folder in folders if _step(folder) == step]
        if not chosen:
            steps = ", ".join(str(_step(folder)) for folder in reversed(folders))
            raise ValueError(f"{run} has no checkpoint of step {step}; it has those of {steps}")
        return Checkpoint(chosen[0], _state(read_state(chosen[0])))
    newest = newest_checkpoint(run)
    assert newest is not None
    return Checkpoint(newest[0], _state(newest[1]))


def _step(folder: Path) -> int | None:
    digits = folder.name.removeprefix("step_")
    return int(digits) if digits.isdecimal() else None


def _state(raw: Mapping[str, Any]) -> State:
    seen = raw["preprocessing"]
    preprocessing = Preprocessing(seen["size"], tuple(seen["mean"]), tuple(seen["std"]))
    known = {name: raw[name] for name in State.__dataclass_fields__}
    return State(**known | {"preprocessing": preprocessing})
