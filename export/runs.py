"""A run's folder as training leaves it: which checkpoint to take, and what it says about itself.

    RUN/recipe.yaml                                         the resolved recipe
    RUN/checkpoints/step_00001234/model.safetensors         the whole method: student, teacher, heads
    RUN/checkpoints/step_00001234/state.json                everything else, and the sums of the other files

Only a folder named `step_*` is complete; one whose sums do not hold is damaged.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clove_hub.zoo import read_tensors

FORMAT = 1
log = logging.getLogger(__name__)


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
    folders = sorted((run / "checkpoints").glob("step_*"), reverse=True)
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
        return Checkpoint(chosen[0], _read_state(chosen[0]))
    for folder in folders:
        try:
            return Checkpoint(folder, _read_state(folder))
        except ValueError as error:
            log.warning("passing over a damaged checkpoint, an older one is used instead: %s", error)
    raise ValueError(
        f"{run} has {len(folders)} checkpoints and none is whole (see the warnings): "
        "take them from a backup, or train again"
    )


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _step(folder: Path) -> int | None:
    digits = folder.name.removeprefix("step_")
    return int(digits) if digits.isdecimal() else None


def _read_state(folder: Path) -> State:
    """The state of a checkpoint all of whose files are as they were written."""
    path = folder / "state.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"{path} has format {found!r}, expected {FORMAT}: use the version of clove-hub that wrote it")
    try:
        preprocessing = raw["preprocessing"]
        state = State(
            preprocessing=Preprocessing(
                preprocessing["size"], tuple(preprocessing["mean"]), tuple(preprocessing["std"])
            ),
            **{name: raw[name] for name in State.__dataclass_fields__ if name != "preprocessing"},
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}: use the version of clove-hub that wrote it") from error
    if "model.safetensors" not in state.files:
        raise ValueError(f"{path} lists no model.safetensors among its files ({', '.join(state.files)})")
    for name, expected in state.files.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")
        if (found := sha256(folder / name)) != expected:
            raise ValueError(f"{folder / name} has sha256 {found[:12]}..., state.json says {expected[:12]}...")
    return state
