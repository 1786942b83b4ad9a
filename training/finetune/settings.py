"""How a task is fine-tuned: the protocol's settings, typed, and the user's `section.key=value` on top."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from clove_hub import settings as typed
from clove_hub.evaluation.result import FREE
from clove_hub.settings import build, nearest, plain, read_override

Task = Literal["detection", "instances", "keypoints", "segmentation"]
TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True)
class DataSettings:
    fraction: float = 1.0
    """Share of the training images that is used: 0.01, 0.02, 0.05 and 0.1 are the low-data settings."""
    list_seed: int = 0
    """Of the list of images that `fraction` chooses; another run.seed does not change the list."""
    workers: int = 2
    """Processes that read and decode, for each training process."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"data.fraction={self.fraction:g}: a share above 0 and at most 1, as in 0.1 for a tenth")
        if self.workers < 0:
            raise ValueError(f"data.workers={self.workers}: must not be negative")


@dataclass(frozen=True)
class DetectionImages:
    shortest_edge: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    """In pixels; a training image gets one of them at random, a test image the largest."""
    longest_edge: int = 1333
    """Pixels; an image whose longer side would exceed it is made smaller."""

    def __post_init__(self) -> None:
        if not self.shortest_edge or min(self.shortest_edge) < 32:
            raise ValueError(f"images.shortest_edge={list(self.shortest_edge)}: give sizes of at least 32 pixels")
        if self.longest_edge < max(self.shortest_edge):
            raise ValueError(
                f"images.longest_edge={self.longest_edge} is below images.shortest_edge={max(self.shortest_edge)}"
            )


@dataclass(frozen=True)
class SegmentationImages:
    crop: int = 513
    """Side of the training crops in pixels; test images keep their size."""
    scale: tuple[float, float] = (0.5, 2.0)
    """A training image is resized by a random factor between these before it is cropped."""

    def __post_init__(self) -> None:
        if self.crop < 32:
            raise ValueError(f"images.crop={self.crop}: must be at least 32 pixels")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"images.scale={list(self.scale)}: a lower and an upper factor above 0")


@dataclass(frozen=True)
class DetectionNetwork:
    head: Literal["conv", "mlp"] = "conv"
    """`conv`: four convolutions and one linear layer, batch norm in pyramid, box and mask head, as in the papers'
    protocol. `mlp`: two linear layers and no batch norm outside the backbone, as in Detectron2's plain configs."""
    rois: int = 512
    """Proposals of an image that the box head trains on."""
    proposals: int = 1000
    """Proposals of a test image, over all levels; training takes twice as many."""
    detections: int = 100
    """Of a test image, at most."""

    def __post_init__(self) -> None:
        _at_least_one(self, "network", "rois", "proposals", "detections")


@dataclass(frozen=True)
class SegmentationNetwork:
    channels: int = 256
    """Of the head's two convolutions, whose dilation is 6."""


@dataclass(frozen=True)
class BatchSettings:
    total: int = 16
    """Images of an optimizer step, over all processes. Learning rate and schedule follow it."""

    def __post_init__(self) -> None:
        _at_least_one(self, "batch", "total")


@dataclass(frozen=True)
class OptimizerSettings:
    """SGD."""

    learning_rate: float = 0.02
    """At the peak, for 16 images; multiplied with batch.total / 16."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """Not of the scales and shifts of norms, as in Detectron2."""


@dataclass(frozen=True)
class ScheduleSettings:
    steps: int | None = None
    """Optimizer steps; without it, and without `epochs`, the protocol's number times 16 / batch.total."""
    epochs: float | None = None
    """Passes over the training images, instead of steps."""
    warmup_steps: int | None = None
    """Of a straight line from a thousandth of the peak; by default the protocol's 1000 times 16 / batch.total, but at
    most a tenth of the steps."""
    decay_at: tuple[float, ...] = (2 / 3, 8 / 9)
    """Shares of the steps after which the learning rate is divided by ten."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"schedule.steps={self.steps} and schedule.epochs={self.epochs:g}: give one of them")
        for key in ("steps", "epochs"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ValueError(f"schedule.{key}={value}: must be above 0")
        if list(self.decay_at) != sorted(set(self.decay_at)) or not all(0 < share < 1 for share in self.decay_at):
            raise ValueError(f"schedule.decay_at={list(self.decay_at)}: rising shares between 0 and 1")


@dataclass(frozen=True)
class RunSettings:
    seed: int = 0
    """Of the heads' initial weights, the order of the images and all that is random in training."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the forward pass in training; weights, optimizer and evaluation are float32."""
    precise_bn: int = 200
    """Batches over which the statistics of batch norm are taken anew after training; 0 keeps the running ones."""
    pictures: int = 8
    """Test images that are drawn with what was found in them."""
    log_every: int = 20
    """Steps between two rows of metrics.jsonl."""
    save_every: int = 1000
    """Steps between two checkpoints."""
    keep: int = 2
    """How many of the newest checkpoints stay."""

    def __post_init__(self) -> None:
        _at_least_one(self, "run", "log_every", "save_every", "keep")


@dataclass(frozen=True)
class Settings:
    task: Task
    images: DetectionImages | SegmentationImages
    network: DetectionNetwork | SegmentationNetwork
    data: DataSettings = field(default_factory=DataSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    run: RunSettings = field(default_factory=RunSettings)


def protocol(task: Task) -> Settings:
    """The settings of the papers' protocol: Detectron2's 1x schedule, and the FCN of VOC 2012."""
    if task != "segmentation":
        return Settings(task, DetectionImages(), DetectionNetwork())
    return Settings(
        task,
        SegmentationImages(),
        SegmentationNetwork(),
        optimizer=OptimizerSettings(learning_rate=0.003),
        schedule=ScheduleSettings(decay_at=(0.7, 0.9), warmup_steps=0),
    )


PROTOCOL_BATCH = 16
PROTOCOL_STEPS: dict[Task, int] = {
    "detection": 90_000,
    "instances": 90_000,
    "keypoints": 90_000,
    "segmentation": 30_000,
}
PROTOCOL_WARMUP = 1000


def read_settings(task: Task, overrides: Sequence[str]) -> Settings:
    """The protocol's settings with `section.key=value` on top, each value read as YAML.

    Raises:
        ValueError: an override that cannot be read, an unknown key, a value of another type or out of range.
    """
    settings = protocol(task)
    sections = [f.name for f in dataclasses.fields(settings) if f.name != "task"]
    changes: dict[str, dict[str, Any]] = {}
    for override in overrides:
        section, key, value = read_override(override)
        if section not in sections:
            raise ValueError(
                f"unknown section {section!r} in {override!r}{nearest(section, sections)}; "
                f"there are {', '.join(sections)}"
            )
        changes.setdefault(section, {})[key] = value
    changed = {}
    for section, values in changes.items():
        current = getattr(settings, section)
        changed[section] = build(type(current), plain(current) | values, section, within=f"for {task}, ")
    return dataclasses.replace(settings, **changed)


def as_sections(settings: Settings) -> dict[str, Any]:
    """Plain data, every default written out."""
    sections = [f.name for f in dataclasses.fields(settings) if f.name != "task"]
    return {"task": settings.task} | {section: plain(getattr(settings, section)) for section in sections}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What keeps two `as_sections` from being the same run: `section.key: old -> new`."""
    return typed.differences(old, new, FREE)


def _at_least_one(settings: Any, section: str, *keys: str) -> None:
    for key in keys:
        if getattr(settings, key) < 1:
            raise ValueError(f"{section}.{key}={getattr(settings, key)}: must be at least 1")
