"""A run's checkpoint, as used outside training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from torch import Tensor

from clove_hub.documents import require_shallow
from clove_hub.runs import STATE_FILE, checkpoint_folders, newest_checkpoint, read_state
from clove_hub.settings import convert
from clove_hub.zoo.checks import require_names_and_shapes
from clove_hub.zoo.tensors import read_tensors

from .architectures import architecture, checked_model_args, require_architecture
from .weights import Preprocessing, Weights, read_preprocessing


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of a run: its folder, and the content of its `state.json`."""

    folder: Path
    step: int
    steps_total: int
    epoch: int
    finished: bool
    images_seen: int
    method: str
    exported: str
    """The encoder that export writes: `student` or `teacher`."""
    backbone: str
    """The architecture's name in timm."""
    preprocessing: Preprocessing
    data: dict[str, Any]
    """`name`, `fingerprint` and `images` of the image source."""
    hardware: str
    versions: dict[str, str]
    recipe: dict[str, Any]
    """Resolved recipe, with all defaults."""
    pretrained: dict[str, Any] | None
    """Facts about the initial weights of the backbone; None for random ones."""
    changes: tuple[dict[str, Any], ...]
    """Changes during the run: `step`, and what was `changed` from then on, in words."""
    files: dict[str, str]
    """sha256 of each file of the checkpoint, by name."""

    @property
    def args(self) -> dict[str, Any]:
        """Additional arguments of `timm.create_model` in the recipe."""
        return dict(self.recipe.get("backbone", {}).get("args", {}))

    @property
    def model_args(self) -> dict[str, Any]:
        """The arguments among them that change the model."""
        return checked_model_args(self.args, self.backbone, f"the recipe of {self.folder}")

    def tensors(self) -> dict[str, Tensor]:
        """The exported encoder's tensors, by timm's names.

        Raises:
            ValueError: there are none.
        """
        tensors, _ = read_tensors(self.folder / "model.safetensors")
        prefix = f"{self.exported}.backbone."
        backbone = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
        if not backbone:
            raise ValueError(
                f"{self.folder / 'model.safetensors'} holds no tensors under {prefix}* (found "
                f"{len(tensors)}, such as {', '.join(list(tensors)[:3])}), although its state.json names "
                f"{self.exported!r} as exported"
            )
        return backbone


def read_run(checkpoint: Checkpoint, where: str, name: str) -> Weights:
    """The exported encoder of a checkpoint.

    Args:
        where: the origin of the checkpoint, for messages: `the run runs/photos`.
        name: as in `Weights`.

    Raises:
        ValueError: a tensor is missing, unexpected or mis-shaped.
    """
    tensors, step, args = checkpoint.tensors(), checkpoint.step, checkpoint.model_args
    what = f"the {checkpoint.exported} of {where} at step {step}"
    known = architecture(checkpoint.backbone, args, what)
    require_names_and_shapes(tensors, known.shapes, f"{what} ({known.name})")
    origin: dict[str, Any] = {"step": step, "method": checkpoint.method, "encoder": checkpoint.exported}
    license = None
    if checkpoint.pretrained:
        origin["pretrained"], license = checkpoint.pretrained, checkpoint.pretrained.get("license")
    images = checkpoint.preprocessing
    return Weights(f"{name} (step {step})", what, "run", known.name, tensors, images, args, origin, license=license)


def is_run(folder: Path) -> bool:
    """Whether it is the folder of a training run."""
    return (folder / "recipe.yaml").is_file() or (folder / "checkpoints").is_dir()


def find_checkpoint(run: Path, step: int | None = None) -> Checkpoint:
    """The newest undamaged checkpoint, with a warning for each newer one that is damaged; or that of `step`.

    Raises:
        ValueError: `run` is not a run, has no complete or no undamaged checkpoint, or not the requested one.
    """
    if not is_run(run):
        found = "it does not exist" if not run.exists() else "found neither recipe.yaml nor checkpoints/ in it"
        raise ValueError(f"{run} is not the folder of a run: {found}. Give the folder that run.output named.")
    if (run / "settings.yaml").is_file() and not (run / "recipe.yaml").is_file():
        raise ValueError(
            f"{run} is a fine-tuning run, which changed the backbone for its task: give what it started from"
        )
    folders = checkpoint_folders(run)
    if not folders:
        raise ValueError(
            f"{run} has no complete checkpoint (checkpoints/step_*): start its training again with the same "
            "recipe; it saves every run.save_every steps and when it is stopped"
        )
    if step is not None:
        chosen = [folder for folder in folders if _step(folder) == step]
        if not chosen:
            steps = ", ".join(str(_step(folder)) for folder in reversed(folders))
            raise ValueError(f"{run} has no checkpoint of step {step}; it has those of {steps}")
        return read_checkpoint(chosen[0])
    newest = newest_checkpoint(run)
    assert newest is not None
    return _checkpoint(*newest)


def read_checkpoint(folder: Path) -> Checkpoint:
    """One checkpoint, by its own folder.

    Raises:
        ValueError: it is incomplete or damaged.
    """
    return _checkpoint(folder, read_state(folder))


def _step(folder: Path) -> int | None:
    digits = folder.name.removeprefix("step_")
    return int(digits) if digits.isdecimal() else None


INNER: Mapping[str, Mapping[str, type]] = {
    "data": {"name": str, "fingerprint": str, "images": int},
    "preprocessing": {"size": int, "mean": list, "std": list},
    "recipe": {"method": dict},
}
"""The fields of the objects in a state, and their types."""


def _checkpoint(folder: Path, state: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint from a state with valid values.

    Raises:
        ValueError: a value is invalid.
    """
    where, way_out = str(folder / STATE_FILE), "use another checkpoint, or train again"
    try:
        require_shallow(state, "it")
        types = get_type_hints(Checkpoint) | {"preprocessing": dict[str, Any]}
        state = {"changes": [], "pretrained": None, **state}  # runs of version 0.1 have none
        found = {key: convert(state[key], kind, key) for key, kind in types.items() if key != "folder"}
        for part, kinds in INNER.items():
            for key, kind in kinds.items():
                convert(found[part].get(key), kind, f"{part}.{key}")
        for number, change in enumerate(found["changes"]):
            convert(change.get("step"), int, f"changes[{number}].step")
            convert(change.get("changed"), tuple[str, ...], f"changes[{number}].changed")
        for part in ("versions", "files"):
            for key, value in found[part].items():
                convert(value, str, f"{part}.{key}")
        for section in ("backbone", "batch", "optimizer", "schedule"):
            convert(found["recipe"].get(section, {}), dict[str, Any], f"recipe.{section}")
        network = found["recipe"].get("backbone", {})
        args = checked_model_args(network.get("args"), found["backbone"], "recipe.backbone.args")
        convert(network.get("level", -1), int, "recipe.backbone.level")
        for key in ("source", "license", "model"):
            convert((found["pretrained"] or {}).get(key), str | None, f"pretrained.{key}")
        require_architecture(found["backbone"], "backbone=")
    except ValueError as error:
        raise ValueError(f"{where} is not what training wrote ({error}): {way_out}") from error
    images, bands = found["preprocessing"], args.get("in_chans", 3)
    cfg = {"input_size": [bands, images["size"], images["size"]], "mean": images["mean"], "std": images["std"]}
    preprocessing = read_preprocessing(cfg, where, way_out, bands, found["recipe"])
    return Checkpoint(folder, **found | {"preprocessing": preprocessing})
