"""Where a backbone can come from: a bundle, a run, the Hub, a file. All give the same, named as in timm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clove_hub.views import IMAGENET_MEAN, IMAGENET_STD
from clove_hub.zoo.released import recognize
from clove_hub.zoo.resnets import not_a_resnet
from clove_hub.zoo.tensors import printable, read_tensors, require_finite, require_names_and_shapes

from .architectures import architecture
from .run import find_checkpoint, is_run

HUB = "hf-hub:"
LOCAL = "local-dir:"


@dataclass(frozen=True)
class Source:
    """A complete backbone without a classifier: every tensor in its place, every value finite."""

    what: str
    """For messages: `the bundle photos/bundle`."""
    architecture: str
    """Its name in timm."""
    tensors: dict[str, Tensor]
    """By timm's names, in the type they were stored in."""
    mean: tuple[float, ...]
    """Of red, green and blue, where white is 1."""
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()
    """What was left out or taken for granted, in sentences."""


def load_source(source: str) -> Source:
    """Reads a backbone.

    Args:
        source: a bundle's or run's folder, `hf-hub:organization/name[@revision]`, a checkpoint that a paper's
            authors released, or a file with a ResNet in the names of timm, torchvision, MMSegmentation or Detectron2.

    Raises:
        ValueError: it is none of these, it cannot be read without running code, a tensor is missing,
            unexpected, mis-shaped or not finite. The message says what was found.
    """
    loaded = _load(source)
    require_finite(loaded.tensors, loaded.what)
    return loaded


def _load(source: str) -> Source:
    if source.startswith(HUB):
        return _from_hub(source)
    path = Path(source.removeprefix(LOCAL))
    if (path / "config.json").is_file():
        return _from_bundle(path / "config.json", path / "model.safetensors", f"the bundle {path}")
    if is_run(path):
        return _from_run(path)
    if path.is_dir():
        raise ValueError(
            f"{path} is neither a bundle (config.json, model.safetensors) nor a run (recipe.yaml, checkpoints/)"
        )
    if not path.exists():
        raise ValueError(
            f"{source} does not exist: expected a bundle's or run's folder, a file with weights, "
            f"or {HUB}organization/name"
        )
    return _from_file(path)


def _from_hub(source: str) -> Source:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, _, revision = source.removeprefix(HUB).partition("@")
    try:
        config, weights = (
            Path(hf_hub_download(repository, name, revision=revision or None))
            for name in ("config.json", "model.safetensors")
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"cannot fetch config.json and model.safetensors of {source} ({type(error).__name__}: {reason}). "
            "Check the name, the network, and for a private repository `hf auth login`."
        ) from error
    return _from_bundle(config, weights, source)


def _from_bundle(config_path: Path, weights: Path, what: str) -> Source:
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        name = config["architecture"]
        cfg: Mapping[str, Any] = config.get("pretrained_cfg", config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{what}: its config.json is not one that timm writes or reads ({type(error).__name__}: {error})"
        ) from error
    tensors, _ = read_tensors(weights)
    tensors, notes = _without(cfg.get("classifier") or (), tensors)
    known = architecture(name)
    require_names_and_shapes(tensors, known.shapes, f"{what} ({known.name})")
    mean, std = (tuple(cfg.get(key) or default) for key, default in _IMAGENET)
    return Source(what, known.name, tensors, mean, std, notes)


def _from_run(run: Path) -> Source:
    checkpoint = find_checkpoint(run)
    state, tensors = checkpoint.state, checkpoint.backbone()
    known = architecture(state.backbone)
    what = f"the {state.exported} of the run {run} at step {state.step}"
    require_names_and_shapes(tensors, known.shapes, f"{what} ({known.name})")
    return Source(what, known.name, tensors, state.preprocessing.mean, state.preprocessing.std)


def _from_file(path: Path) -> Source:
    what = str(path)
    tensors, _ = read_tensors(path)
    released = recognize(tensors, what)
    if released is None:
        raise not_a_resnet(tensors, what)
    backbone = released.backbone(released.exported)
    if released.exported != "backbone":
        what = f"the {released.exported} of {path}, a released {released.title} checkpoint"
        return Source(what, released.architecture, backbone, IMAGENET_MEAN, IMAGENET_STD)
    notes = ["The file does not say how images were normalized; ImageNet's mean and std are taken."]
    if released.heads:
        kind = "classifier" if all(name.startswith("fc.") for name in released.heads) else "head"
        notes.insert(0, f"The {kind} was left out ({', '.join(map(printable, sorted(released.heads)[:6]))}).")
    return Source(what, released.architecture, backbone, IMAGENET_MEAN, IMAGENET_STD, tuple(notes))


_IMAGENET = (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))


def _without(
    classifiers: str | tuple[str, ...] | list[str], tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors without those of a classifier, and a sentence about it if there was one."""
    names = [classifiers] if isinstance(classifiers, str) else list(classifiers)
    heads = sorted(name for name in tensors if any(name.startswith(f"{head}.") for head in names))
    if not heads:
        return tensors, ()
    left = {name: tensor for name, tensor in tensors.items() if name not in heads}
    return left, (f"The classifier was left out ({', '.join(heads)}).",)
