"""Fine-tuning settings of a model of transformers: its defaults, and the user's `section.key=value` on top."""

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
"""Pixels; the sides of training images are multiples of it."""
NETWORK = "network"
"""The section for the keys of the model's config in transformers."""


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
            raise ValueError(f"images.size={self.size}: must be a multiple of {STRIDE}, such as {near}")
        if self.longest_edge is not None and self.longest_edge < self.size:
            raise ValueError(f"images.longest_edge={self.longest_edge}: must be at least images.size={self.size}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"images.scale={list(self.scale)}: must be a lower and an upper factor above 0")


@dataclass(frozen=True)
class ModelBatch:
    total: int = 16
    """Images per optimizer step, over all processes."""
    per_device: int | None = None
    """Images per forward pass of a process; null for its whole share. With fewer, gradients are accumulated."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "batch", "total", "per_device")


@dataclass(frozen=True)
class ModelOptimizer:
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW, for all but the backbone."""
    backbone_rate: float = 0.1
    """The backbone's learning rate, as a factor of `learning_rate`; 0 keeps its weights."""
    weight_decay: float = 1e-4
    """Not for biases, norms and embeddings."""
    clip_norm: float = 0.1
    """Maximum norm of the gradient; 0 for no clipping."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "optimizer", "learning_rate", "backbone_rate", "weight_decay", "clip_norm")


@dataclass(frozen=True)
class ModelSchedule:
    epochs: float | None = 72
    """Passes over the training images."""
    steps: int | None = None
    """Optimizer steps, instead of epochs."""
    warmup_steps: int | None = None
    """Steps of the linear warm-up, followed by a cosine decay to 0; null for 1000, but at most a tenth of the steps."""

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
    """Seed of the heads' initial weights, the order of the images and everything random in training."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of the forward pass in training; weights, optimizer and evaluation are float32."""
    log_every: int = 20
    """Steps between two rows of metrics.jsonl."""
    save_every: int = 1000
    """Steps between two checkpoints. A run that is stopped is also saved after its last complete step."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    timeout: float = 30.0
    """Minutes that a process waits for another one, or for its data-loading workers."""

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
    """Keys of the model's config in transformers that differ from that class's defaults."""

    @property
    def squares(self) -> bool:
        """Whether images are resized to squares, whatever their aspect ratio."""
        return self.images.longest_edge is None

    def steps(self, images: int) -> int:
        """Optimizer steps, for a number of training images."""
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
        # Learning rates, decay and clipping from the models' papers; a cosine where a paper uses a step schedule.
        # Unlike the default DETR of transformers, the paper's has a loss at each decoder layer.
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
"""Settings of how a run is executed. Except for segmenters' batch norm, splitting the batch changes sums only in their
last digits."""


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
            f"images.longest_edge={settings.images.longest_edge or 'null'}: {model} "
            + ("takes squares" if DEFAULTS[model].squares else "keeps an image's aspect ratio and needs a limit")
            + ": leave it out"
        )
    return settings


def as_sections(settings: ModelSettings) -> dict[str, Any]:
    """The settings as plain data, with all defaults."""
    sections = {section: plain(getattr(settings, section)) for section in SECTIONS}
    return {"model": settings.model} | sections | {NETWORK: dict(settings.network)}


def is_changed(settings: ModelSettings) -> bool:
    """Whether a setting that affects the figures is not the model's default."""
    defaults = as_sections(DEFAULTS[settings.model])
    return bool(differences(defaults, as_sections(settings), FREE_HERE | {"run.seed"}))
