"""The result of loading any source of weights: tensors by timm's names, and facts about them."""

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
    """Side in pixels; for a run, of the views that student and teacher share."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each band, where white is 1; of red, green and blue if there are three."""
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    depth: Depth = 8
    """Bits per value."""

    @property
    def normalization(self) -> dict[str, list[float]]:
        """Mean and standard deviation as in results, settings and configs of other libraries."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @property
    def reading(self) -> Reading:
        """The bands and the depth that images are decoded to for the backbone."""
        return Reading(len(self.mean), self.depth)


@dataclass(frozen=True)
class Weights:
    """A complete backbone without a classifier: every tensor in its place, every value finite."""

    name: str
    """For tables: the given source, with the step of a run."""
    what: str
    """For messages: `the student of the run runs/photos at step 150`."""
    kind: Kind
    architecture: str
    """Its name in timm, without a tag."""
    tensors: dict[str, Tensor]
    """Tensors by timm's names, in their stored type."""
    preprocessing: Preprocessing = Preprocessing()
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Additional arguments of `timm.create_model`, such as `img_size`."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Plain data about the origin of the weights; the keys depend on `kind`."""
    notes: tuple[str, ...] = ()
    """What was left out or assumed, in sentences."""
    license: str | None = None
    """License as an id of the Hub, if known."""
    model: str | None = None
    """The corresponding model of the zoo, if known."""
    hub_id: str | None = None
    """Its repository on the Hub, if it came from one or timm has one."""

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.architecture, self.tensors, self.model_args)

    def build(self) -> nn.Module:
        """The timm model with these weights, in eval mode, on the CPU. The random state is unchanged."""
        with torch.random.fork_rng(devices=[]):
            model = build_model(self.architecture, self.model_args)
        model.load_state_dict(self.tensors)
        return model.eval()

    @property
    def plain_resnet(self) -> ResNet | None:
        """The ResNet that other libraries also build, or None. Names and shapes alone do not make it one."""
        return None if self.model_args else RESNETS.get(self.architecture)

    def resnet(self, library: str) -> ResNet:
        """The same for a library that supports nothing else.

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

    They are the same wherever the weights are: in a file, in a run, in memory, on any device. 16-bit values count as
    the float32 values of a model built from them. The normalization of images is not included: it is a setting of the
    user, and a run, its bundle and a converted file without a mean hold the same weights.

    Args:
        architecture: the name in timm, without a tag.
        tensors: tensors of the backbone without a classifier, by timm's names, in any order.
        model_args: additional arguments of `timm.create_model`.
    """
    digest = hashlib.sha256(json.dumps([architecture, model_args or {}], sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        values = (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        digest.update(json.dumps([name, str(values.dtype), list(values.shape)]).encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def restriction(license: str | None) -> str | None:
    """The restriction of a license, by its id on the Hub, on weights trained further; None if none is known."""
    parts = (license or "").lower().split("-")
    forbidden = {"nc": "allows no commercial use", "nd": "does not allow sharing what is trained from it"}
    found = [words for part, words in forbidden.items() if part in parts]
    if license in ("other", "unknown"):
        found = ["the Hub has no name for: read it before you share what is trained from it"]
    return " and ".join(found) or None


def told(weights: Weights) -> dict[str, Any]:
    """The facts about a training's initial weights that state.json, bundle, config and card hold."""
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
    """The name in timm of a model in memory, without a tag; the class's name if it is not from timm."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)


LEAST_STD = 1e-5
"""Minimum standard deviation of a band where white is 1: less than a level of 16 bits."""
LARGEST_SIDE = 2048
"""Maximum side in pixels of the images that a backbone was trained with; timm's own have up to 1024."""
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos", "random")
"""timm's names of interpolations."""


def read_preprocessing(
    cfg: Mapping[str, Any],
    where: str,
    way_out: str = "correct it, or export or download it again",
    bands: int = 3,
    recipe: object = None,
) -> Preprocessing:
    """Preprocessing from a `pretrained_cfg` of timm; what it does not have, or has as null, is as timm assumes it.

    Args:
        where: its origin, for messages.
        way_out: the instruction in the message.
        bands: bands of the model's images.
        recipe: of the run that the weights come from, which says how many bits were kept; with other than three bands all.

    Raises:
        ValueError: a value is not valid in timm.
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
    """Whether it is a list of `count` numbers within these bounds; NaN never is."""
    return (
        isinstance(values, list | tuple)
        and len(values) == count
        and all(isinstance(v, int | float) and not isinstance(v, bool) and least <= v <= most for v in values)
    )
