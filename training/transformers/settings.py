"""How a model of transformers is fine-tuned: defaults of each model, and the user's `section.key=value` on top."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from clove_hub.evaluation.result import FREE
from clove_hub.settings import build, convert, differences, plain, read_overrides, require_at_least, require_minutes
from clove_hub.weights.transformers import MODELS

from ..finetune.settings import FinetuneData

STRIDE = 32
"""Pixels: what sides of images are multiples of in training."""
NETWORK = "network"
"""The section that holds whatever the model's own config of transformers has."""


@dataclass(frozen=True)
class ModelImages:
    size: int = 640
    """Pixels. For rt_detr_v2 and d_fine, both sides that an image is resized to; for the others, its shorter side."""
    longest_edge: int | None = None
    """Pixels; an image whose longer side would exceed it is scaled down further. Null for rt_detr_v2 and d_fine, whose
    images are squares."""
    scale: tuple[float, float] = (0.75, 1.25)
    """In training, images are scaled to `size` times a random factor between these. For detectors it is rounded to a
    multiple of 32 and the same for all images of a step. Segmenters then crop a square with sides of `size`."""

    def __post_init__(self) -> None:
        if self.size < STRIDE or self.size % STRIDE:
            near = max(round(self.size / STRIDE), 1) * STRIDE
            raise ValueError(f"images.size={self.size}: must be a multiple of {STRIDE}, as {near} is")
        if self.longest_edge is not None and self.longest_edge < self.size:
            raise ValueError(f"images.longest_edge={self.longest_edge} is below images.size={self.size}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"images.scale={list(self.scale)}: a lower and an upper factor above 0")


@dataclass(frozen=True)
class ModelBatch:
    total: int = 16
    """Images in an optimizer step, over all processes."""
    per_device: int | None = None
    """Images in one forward pass of a process; null for its whole share. Fewer need less memory; gradients are accumulated."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "batch", "total", "per_device")


@dataclass(frozen=True)
class ModelOptimizer:
    learning_rate: float = 1e-4
    """Of AdamW at the peak, for all but the backbone."""
    backbone_rate: float = 0.1
    """The backbone's learning rate, as a part of the others'; 0 keeps its weights."""
    weight_decay: float = 1e-4
    """Not of biases, norms and embeddings."""
    clip_norm: float = 0.1
    """The gradient's norm is brought down to this; 0 for no limit."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "optimizer", "learning_rate", "backbone_rate", "weight_decay", "clip_norm")


@dataclass(frozen=True)
class ModelSchedule:
    epochs: float | None = 72
    """Passes over the training images."""
    steps: int | None = None
    """Optimizer steps, instead of epochs."""
    warmup_steps: int | None = None
    """Of a straight line up to the peak, after which a cosine leads down to 0; null for 1000, but at most a tenth of the steps."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "schedule", "steps")
        require_at_least(0, self, "schedule", "warmup_steps")
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"schedule.epochs={self.epochs:g}: must be above 0")
        if self.epochs is self.steps is None:
            raise ValueError("schedule.epochs=null and schedule.steps=null: give one of them")


@dataclass(frozen=True)
class ModelRun:
    seed: int = 0
    """Of the heads' initial weights, the order of the images and all that is random in training."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the forward pass in training; weights, optimizer and evaluation are float32."""
    log_every: int = 20
    """Steps between two rows of metrics.jsonl."""
    save_every: int = 1000
    """Steps between two checkpoints. A run that is stopped is saved after its last whole step besides."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    timeout: float = 30.0
    """Minutes after which a process gives up waiting for another one, or for its data-loading workers."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "run", "log_every", "save_every", "keep")
        require_minutes(self)


@dataclass(frozen=True)
class ModelSettings:
    model: str
    """One of `MODELS`."""
    images: ModelImages = field(default_factory=ModelImages)
    batch: ModelBatch = field(default_factory=ModelBatch)
    optimizer: ModelOptimizer = field(default_factory=ModelOptimizer)
    schedule: ModelSchedule = field(default_factory=ModelSchedule)
    data: FinetuneData = field(default_factory=FinetuneData)
    run: ModelRun = field(default_factory=ModelRun)
    network: Mapping[str, Any] = field(default_factory=dict)
    """Of the model's config in transformers, where it is not that class's default."""

    @property
    def squares(self) -> bool:
        """Whether images are resized to squares, whatever their aspect."""
        return self.images.longest_edge is None

    def steps(self, images: int) -> int:
        """Optimizer steps, for so many training images."""
        if self.schedule.steps is not None:
            return self.schedule.steps
        assert self.schedule.epochs is not None
        return max(round(self.schedule.epochs * images / self.batch.total), 1)

    def warmup(self, steps: int) -> int:
        """Steps of the warm-up.

        Raises:
            ValueError: it is as long as the run.
        """
        given = self.schedule.warmup_steps
        if given is not None and given >= steps:
            raise ValueError(f"schedule.warmup_steps={given}, but the run has {steps} steps: lower it or train longer")
        return min(1000, steps // 10) if given is None else given


_SEGMENTER = ModelImages(512, longest_edge=2048, scale=(0.5, 2.0))
DEFAULTS = {
    settings.model: settings
    for settings in (
        # The rates, decay and clipping of the models' own papers; where a paper drops the rate in steps, a cosine.
        # Unlike DETR of transformers by itself, the paper's learns from each decoder layer.
        ModelSettings(
            "detr",
            ModelImages(800, longest_edge=1333, scale=(0.6, 1.0)),
            schedule=ModelSchedule(150),
            network={"auxiliary_loss": True},
        ),
        ModelSettings("rt_detr_v2"),
        ModelSettings("d_fine", optimizer=ModelOptimizer(2.5e-4, weight_decay=1.25e-4)),
        ModelSettings(
            "mask2former",
            _SEGMENTER,
            optimizer=ModelOptimizer(weight_decay=0.05, clip_norm=0.01),
            schedule=ModelSchedule(50),
        ),
        ModelSettings(
            "upernet",
            _SEGMENTER,
            optimizer=ModelOptimizer(weight_decay=0.05, clip_norm=1.0),
            schedule=ModelSchedule(50),
        ),
    )
}
assert DEFAULTS.keys() == MODELS.keys()
SECTIONS = [f.name for f in dataclasses.fields(ModelSettings) if f.name not in ("model", NETWORK)]
FREE_HERE = FREE | {"batch.per_device"}
"""Settings that change how a run is carried out. How the batch is cut changes sums in their last digits alone, but for
segmenters' batch norm."""


def read_settings(model: str, overrides: Sequence[str]) -> ModelSettings:
    """A model's defaults with `section.key=value` on top, each value read as YAML.

    Raises:
        ValueError: an override that cannot be read, an unknown key, a value of another type or out of range. Keys of the
            section `network` are checked when the model is built.
    """
    settings = DEFAULTS[model]
    changed: dict[str, Any] = {}
    for section, values in read_overrides(overrides, [*SECTIONS, NETWORK]).items():
        if section == NETWORK:
            changed[NETWORK] = {**settings.network, **{k: convert(v, Any, f"{NETWORK}.{k}") for k, v in values.items()}}
            continue
        current = plain(getattr(settings, section))
        if section == "schedule":
            if {"epochs", "steps"} <= values.keys():
                raise ValueError(
                    f"schedule.epochs={values['epochs']} and schedule.steps={values['steps']}: give one of them"
                )
            if "steps" in values:
                current["epochs"] = None
        changed[section] = build(type(getattr(settings, section)), current | values, section, within=f"for {model}, ")
    settings = dataclasses.replace(settings, **changed)
    if (settings.images.longest_edge is None) != (DEFAULTS[model].images.longest_edge is None):
        raise ValueError(
            f"images.longest_edge={settings.images.longest_edge}: {model} "
            + ("takes squares, without one" if DEFAULTS[model].squares else "keeps an image's aspect and needs one")
        )
    return settings


def as_sections(settings: ModelSettings) -> dict[str, Any]:
    """Plain data, every default written out."""
    sections = {section: plain(getattr(settings, section)) for section in SECTIONS}
    return {"model": settings.model} | sections | {NETWORK: dict(settings.network)}


def is_changed(settings: ModelSettings) -> bool:
    """Whether a setting that decides about the figures is not the model's default."""
    defaults = as_sections(DEFAULTS[settings.model])
    return bool(differences(defaults, as_sections(settings), FREE_HERE | {"run.seed"}))
