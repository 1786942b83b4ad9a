"""What every source of weights gives: tensors by timm's names, and what is known about them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from clove_hub.views import IMAGENET_MEAN, IMAGENET_STD
from clove_hub.zoo.resnets import RESNETS, ResNet

Kind = Literal["run", "bundle", "released", "file", "timm", "random"]


@dataclass(frozen=True)
class Preprocessing:
    """The images that the backbone was trained with."""

    size: int = 224
    """Side in pixels; of a run, of the views that student and teacher share."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Of red, green and blue, where white is 1."""
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875


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

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.architecture, self.tensors, self.model_args)

    def build(self) -> nn.Module:
        """The timm model with these weights, in eval mode, on the CPU. Random state is left as it is."""
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = timm.create_model(self.architecture, num_classes=0, **self.model_args)
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


def architecture_of(model: nn.Module) -> str:
    """The name in timm of a model in memory, without a tag; the class's name for one that timm did not make."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)


def read_preprocessing(cfg: Mapping[str, Any], where: str) -> Preprocessing:
    """Preprocessing from a `pretrained_cfg` of timm; what it does not have is as timm assumes it.

    Raises:
        ValueError: a value is not what timm writes there.
    """
    size = cfg.get("input_size") or (3, 224, 224)
    mean, std = cfg.get("mean") or IMAGENET_MEAN, cfg.get("std") or IMAGENET_STD
    interpolation, crop_pct = cfg.get("interpolation") or "bicubic", cfg.get("crop_pct") or 0.875
    checks = {
        "input_size": (size, _numbers(size) and size[-1] == int(size[-1]) > 0),
        "mean": (mean, _numbers(mean)),
        "std": (std, _numbers(std) and min(std) > 0),
        "interpolation": (interpolation, isinstance(interpolation, str)),
        "crop_pct": (crop_pct, _numbers([crop_pct] * 3) and crop_pct > 0),
    }
    for key, (value, right) in checks.items():
        if not right:
            raise ValueError(f"{where} has {key} {value!r:.80}, which is not what timm writes there")
    red, green, blue = map(float, mean)
    return Preprocessing(int(size[-1]), (red, green, blue), (*map(float, std),), interpolation, float(crop_pct))  # type: ignore[arg-type]


def _numbers(values: object) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    )
