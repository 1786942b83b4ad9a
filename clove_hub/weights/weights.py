"""What every source of weights gives: tensors by timm's names, and what is known about them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clove_hub.backbones import build_model
from clove_hub.data.bands import Reading
from clove_hub.views import IMAGENET_MEAN, IMAGENET_STD, Depth
from clove_hub.zoo.resnets import RESNETS, ResNet

Kind = Literal["run", "bundle", "released", "file", "timm", "random"]


@dataclass(frozen=True)
class Preprocessing:
    """The images that the backbone was trained with."""

    size: int = 224
    """Side in pixels; of a run, of the views that student and teacher share."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Of each band, where white is 1; of red, green and blue where there are three."""
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    depth: Depth = 8
    """Bits of a value that were kept."""

    @property
    def normalization(self) -> dict[str, list[float]]:
        """As results, settings and configs of other libraries hold it."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @property
    def reading(self) -> Reading:
        """What images are decoded into for the backbone."""
        return Reading(len(self.mean), self.depth)


@dataclass(frozen=True)
class Weights:
    """A complete backbone without a classifier: every tensor in its place, every value finite."""

    name: str
    """For tables: the source as it was given, with the step of a run."""
    what: str
    """For messages: `the student of the run runs/photos at step 150`."""
    kind: Kind
    architecture: str
    """Its name in timm, without a tag."""
    tensors: dict[str, Tensor]
    """By timm's names, in the type they were stored in."""
    preprocessing: Preprocessing = Preprocessing()
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `timm.create_model`, such as `img_size`."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Plain data about where the weights come from; the keys depend on `kind`."""
    notes: tuple[str, ...] = ()
    """What was left out or assumed, in sentences."""
    license: str | None = None
    """As the Hub spells it, where it is known."""
    model: str | None = None
    """The model of the zoo that this is, where it is known."""
    hub_id: str | None = None
    """Its repository on the Hub, where it came from one or timm knows one."""

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.architecture, self.tensors, self.model_args)

    def build(self) -> nn.Module:
        """The timm model with these weights, in eval mode, on the CPU. Random state is left as it is."""
        with torch.random.fork_rng(devices=[]):
            model = build_model(self.architecture, self.model_args)
        model.load_state_dict(self.tensors)
        return model.eval()

    @property
    def plain_resnet(self) -> ResNet | None:
        """The ResNet that other libraries build as well; None if it is none. Names and shapes alone do not make it one."""
        return None if self.model_args else RESNETS.get(self.architecture)

    def resnet(self, library: str) -> ResNet:
        """The same for a library that has nothing else.

        Raises:
            ValueError: it is none of RESNETS.
        """
        if self.plain_resnet is None:
            with_args = f" with model_args {dict(self.model_args)!r:.100}" if self.model_args else ""
            raise ValueError(
                f"{self.what} is a {self.architecture}{with_args}, which {library} does not build: expected one of "
                f"{', '.join(RESNETS)}. `clove-hub convert --to timm` takes any architecture"
            )
        return self.plain_resnet


def fingerprint(architecture: str, tensors: Mapping[str, Tensor], model_args: Mapping[str, Any] | None = None) -> str:
    """64 hexadecimal digits that change with the architecture, its arguments, and any value of any tensor.

    They are the same wherever the weights are: in a file, in a run, in memory, on any device. What is stored with 16 bits
    counts as the float32 values that a model built from it has. How images are normalized is not in it: that is a setting
    of whoever uses the weights, and a run, its bundle and a converted file without a mean hold the same weights.

    Args:
        architecture: the name in timm, without a tag.
        tensors: of the backbone without a classifier, by timm's names, in any order.
        model_args: further arguments of `timm.create_model`.
    """
    digest = hashlib.sha256(json.dumps([architecture, model_args or {}], sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        values = (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        digest.update(json.dumps([name, str(values.dtype), list(values.shape)]).encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def restriction(license: str | None) -> str | None:
    """What a license as the Hub spells it forbids with weights that are trained on; None where nothing is known to be."""
    parts = (license or "").lower().split("-")
    forbidden = {"nc": "allows no commercial use", "nd": "does not allow to share what is trained from it"}
    found = [words for part, words in forbidden.items() if part in parts]
    if license in ("other", "unknown"):
        found = ["the Hub has no name for: read it before you share what is trained from it"]
    return " and ".join(found) or None


def told(weights: Weights) -> dict[str, Any]:
    """What is kept, in state.json, bundle, config and card, of the weights that a training went on from."""
    return {
        "source": weights.name,
        "kind": weights.kind,
        "architecture": weights.architecture,
        "model": weights.hub_id,
        "fingerprint": weights.fingerprint,
        "license": weights.license,
        "origin": dict(weights.origin),
    }


def architecture_of(model: nn.Module) -> str:
    """The name in timm of a model in memory, without a tag; the class's name for one that timm did not make."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)


LEAST_STD = 1e-5
"""Of a band where white is 1: less than a level of 16 bits."""
LARGEST_SIDE = 2048
"""Pixels of a side of the images that a backbone was trained with; timm's own have up to 1024."""
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos", "random")
"""As timm names them."""


def read_preprocessing(
    cfg: Mapping[str, Any],
    where: str,
    way_out: str = "correct it, or export or download it again",
    bands: int = 3,
    recipe: object = None,
) -> Preprocessing:
    """Preprocessing from a `pretrained_cfg` of timm; what it does not have, or has as null, is as timm assumes it.

    Args:
        where: what has it, for messages.
        way_out: what the message tells to do.
        bands: of the images that the model takes.
        recipe: of the run that the weights come from, which says how many bits were kept; with other than three bands all.

    Raises:
        ValueError: a value is not what timm writes there.
    """
    given = {key: value for key, value in cfg.items() if value is not None}
    size, crop_pct = given.get("input_size", (3, 224, 224)), given.get("crop_pct", 0.875)
    mean, std = given.get("mean", IMAGENET_MEAN), given.get("std", IMAGENET_STD)
    interpolation = given.get("interpolation", "bicubic")
    sides = f"{bands} channels, height and width, from 1 to {LARGEST_SIDE} pixels"
    each = "three numbers" if bands == 3 else f"{bands} numbers"
    checks = {
        "input_size": (
            size,
            _numbers(size, 3, 1, LARGEST_SIDE) and size[0] == bands and all(v == int(v) for v in size),
            sides,
        ),
        "mean": (mean, _numbers(mean, bands, 0, 1), f"{each} from 0 to 1, where white is 1"),
        "std": (std, _numbers(std, bands, LEAST_STD, 10), f"{each} from {LEAST_STD:g} to 10, where white is 1"),
        "interpolation": (interpolation, interpolation in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
        "crop_pct": (crop_pct, _numbers([crop_pct], 1, 0.1, 2), "a number from 0.1 to 2"),
    }
    for key, (value, right, expected) in checks.items():
        if not right:
            raise ValueError(f"{where} has {key} {value!r:.80}; expected {expected}: {way_out}")
    kept = recipe.get("data") if isinstance(recipe, Mapping) else None
    deep = bands != 3 or (isinstance(kept, Mapping) and kept.get("depth") == 16)
    numbers = tuple(map(float, mean)), tuple(map(float, std))
    return Preprocessing(int(size[-1]), *numbers, interpolation, float(crop_pct), 16 if deep else 8)


def _numbers(values: object, count: int, least: float, most: float) -> bool:
    """Whether it is a list of so many numbers within these bounds; none that is no number is."""
    return (
        isinstance(values, list | tuple)
        and len(values) == count
        and all(isinstance(v, int | float) and not isinstance(v, bool) and least <= v <= most for v in values)
    )
