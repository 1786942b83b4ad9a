"""Fine-tuning settings of a task: presets, which are the papers' protocols, and the user's `section.key=value`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from clove_hub import settings as typed
from clove_hub.evaluation.result import CHANGED, FREE
from clove_hub.settings import build, nearest, plain, read_overrides, require_at_least, require_minutes

from .forms import RandomCrops, SegmentationImages, SquashedImages, SteppedCrops, require_range, require_side

Task = Literal["detection", "instances", "keypoints", "segmentation"]
TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True)
class FinetuneData:
    train: str | None = None
    """The split to train on; null for `train`, or for `trainaug` if a folder in VOC's layout has it."""
    test: str = "val"
    """The split to score."""
    train_images: int | None = None
    """At most this many, spread evenly over the list; null for all."""
    test_images: int | None = None
    """At most this many, spread evenly over the list; null for all."""
    absent_as_zero: bool = False
    """For segmentation: whether a class without pixels in masks and predictions counts as IoU 0 in mIoU, as in
    Revisiting; otherwise it is left out."""
    fraction: float = 1.0
    """Fraction of the training images to use: 0.01, 0.02, 0.05 and 0.1 are the low-data settings."""
    list_seed: int = 0
    """Seed of the list of images that `fraction` chooses; the list does not depend on run.seed."""
    workers: int = 2
    """Data-loading workers of each training process."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"data.fraction={self.fraction:g}: must be above 0 and at most 1, such as 0.1 for a tenth")
        require_at_least(0, self, "data", "workers")
        for key in ("train_images", "test_images"):
            if (limit := getattr(self, key)) is not None and limit < 1:
                raise ValueError(f"data.{key}={limit}: must be at least 1, or null for all images")


@dataclass(frozen=True)
class DetectionImages:
    shortest_edge: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    """Pixels; drawn at random for a training image, the largest for a test image."""
    longest_edge: int = 1333
    """Pixels; an image whose longer side would exceed it is scaled down further."""
    lsj: int | None = None
    """Side in pixels, such as 1024, of large-scale jitter: instead of by the edges, a training image is resized to
    `lsj_scale` of what fits into a square of this side, then cropped or padded to it; null for none."""
    lsj_scale: tuple[float, float] = (0.1, 2.0)
    """Range of the random factor of large-scale jitter."""

    def __post_init__(self) -> None:
        if self.lsj is not None:
            require_side(self.lsj, "lsj")
        require_range(self.lsj_scale, "lsj_scale")
        if not self.shortest_edge or min(self.shortest_edge) < 32:
            raise ValueError(
                f"images.shortest_edge={list(self.shortest_edge)}: must be one or more sizes of at least 32 pixels"
            )
        if self.longest_edge < max(self.shortest_edge):
            raise ValueError(
                f"images.longest_edge={self.longest_edge}: must be at least images.shortest_edge={max(self.shortest_edge)}"
            )


@dataclass(frozen=True)
class DetectionNetwork:
    head: Literal["mlp", "conv"] = "mlp"
    """`mlp`: two linear layers and no batch norm outside the backbone, as in torchvision's and Detectron2's models.
    `conv`: four convolutions and one linear layer, batch norm in pyramid, box and mask head, as in the papers'
    protocol; a step takes several times as long."""
    trainable_layers: int = 5
    """How many of a ResNet's stem and four stages are trained, from the top; 3 is torchvision's and Detectron2's
    default for a backbone that was trained with labels. Other models are trained completely."""
    frozen_norm: bool = False
    """Whether the backbone's batch norm keeps its statistics, scales and shifts, as in torchvision's and Detectron2's
    models: for small batches. The papers train it."""
    rois: int = 512
    """Proposals per training image that the box head is trained on."""
    proposals: int = 1000
    """Proposals per test image, over all levels; twice as many in training."""
    detections: int = 100
    """Maximum detections per test image."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "network", "rois", "proposals", "detections")
        if not 0 <= self.trainable_layers <= 5:
            raise ValueError(f"network.trainable_layers={self.trainable_layers}: must be from 0 (none) to 5 (all)")


@dataclass(frozen=True)
class SegmentationNetwork:
    channels: int = 256
    """Channels of the head's two convolutions."""
    dilation: int = 6
    """Dilation of the head's two convolutions."""
    bias: bool = True
    """Whether the classifier has a bias."""
    dilate_first: bool = False
    """Whether the last stage's first 3x3 convolution, which had the stride, has dilation 2 as the others do."""
    align_corners: bool = False
    """`align_corners` of the bilinear resizing of the scores; if true, test images are not padded."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "network", "channels", "dilation")


@dataclass(frozen=True)
class FinetuneBatch:
    total: int = 16
    """Images per optimizer step, over all processes. SGD's learning rate and the schedule scale with it."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "batch", "total")


@dataclass(frozen=True)
class FinetuneOptimizer:
    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """SGD with momentum, Adam, or AdamW. If another one replaces a preset's SGD, learning_rate defaults to 1e-4 and
    AdamW's weight_decay to 0.05."""
    learning_rate: float = 0.02
    """Peak learning rate for the preset's batch; for SGD it is multiplied by batch.total / the preset's batch."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-4
    """Not for the scales and shifts of norms, unless `decay_all`."""
    decay_all: bool = False
    """Whether weight decay also applies to the scales and shifts of norms; in Detectron2 it does not."""
    clip_norm: float | None = None
    """Maximum norm of the gradient; null for no clipping."""
    ema: float | None = None
    """Decay of the moving average of the weights, which is scored and kept instead of the last weights: such as 0.9999,
    lower in the first steps; null for no average."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"optimizer.learning_rate={self.learning_rate:g}: must be above 0")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"optimizer.clip_norm={self.clip_norm:g}: must be above 0, or null")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"optimizer.ema={self.ema:g}: must be between 0 and 1, such as 0.9999, or null")


@dataclass(frozen=True)
class FinetuneSchedule:
    steps: int | None = None
    """Optimizer steps; by default, without `epochs`, the preset's number times its batch / batch.total."""
    epochs: float | None = None
    """Passes over the training images, instead of `steps`."""
    warmup_steps: int | None = None
    """Steps of the linear warm-up from a thousandth of the peak; by default the preset's number times its batch /
    batch.total, but at most a tenth of the steps; if that is less than 100, 100, or half of a run below 200 steps."""
    decay: Literal["steps", "polynomial"] = "steps"
    """`steps`: divide by ten after each of `decay_at`. `polynomial`: multiply by (1 - step / steps) ** power."""
    decay_at: tuple[float, ...] = (2 / 3, 8 / 9)
    """Fractions of the steps after which the learning rate is divided by ten."""
    power: float = 0.9
    """Exponent of the polynomial."""
    by_epoch: bool = False
    """For segmentation. Epochs are complete (the last, incomplete batch is dropped), the learning rate changes only
    between them, and the best epoch on the test split is reported, as in Revisiting."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"schedule.steps={self.steps} and schedule.epochs={self.epochs:g}: give one of them")
        for key in ("steps", "epochs", "power"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ValueError(f"schedule.{key}={value}: must be above 0")
        if list(self.decay_at) != sorted(set(self.decay_at)) or not all(0 < share < 1 for share in self.decay_at):
            raise ValueError(f"schedule.decay_at={list(self.decay_at)}: must be rising fractions between 0 and 1")


@dataclass(frozen=True)
class FinetuneRun:
    seed: int = 0
    """Seed of the heads' initial weights, the order of the images and everything random in training."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Precision of the forward pass in training; weights, optimizer and evaluation are float32. fp16, with a scaled
    loss, is for GPUs without bfloat16."""
    precise_bn: int = 200
    """Batches over which batch-norm statistics are recomputed after training; 0 keeps the running statistics."""
    evaluate_every: int | None = None
    """Steps between two evaluations on the test split; the last step is always evaluated. The best network is kept,
    for detectors by AP; null evaluates and keeps the last."""
    pictures: int = 8
    """Number of test images that are drawn with their predictions."""
    log_every: int = 20
    """Steps between two rows of metrics.jsonl."""
    save_every: int = 1000
    """Steps between two checkpoints. A run that is stopped or fails is also saved after its last complete step."""
    keep: int = 2
    """Number of newest valid checkpoints to keep."""
    amend: bool = False
    """Resume a run although optimizer, schedule or precision changed; the run records what and when."""
    timeout: float = 30.0
    """Minutes that a process waits for another one, or for its data-loading workers."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "run", "log_every", "save_every", "keep")
        if self.evaluate_every is not None:
            require_at_least(1, self, "run", "evaluate_every")
            if self.precise_bn:
                raise ValueError(
                    f"run.evaluate_every={self.evaluate_every} keeps the best network as it was scored, and run.precise_bn="
                    f"{self.precise_bn} would change its statistics afterwards: add run.precise_bn=0"
                )
        require_minutes(self)


@dataclass(frozen=True)
class FinetuneSettings:
    preset: str
    """The protocol that the settings are based on, one of `PRESETS`."""
    task: Task
    images: DetectionImages | SegmentationImages
    network: DetectionNetwork | SegmentationNetwork
    data: FinetuneData = field(default_factory=FinetuneData)
    batch: FinetuneBatch = field(default_factory=FinetuneBatch)
    optimizer: FinetuneOptimizer = field(default_factory=FinetuneOptimizer)
    schedule: FinetuneSchedule = field(default_factory=FinetuneSchedule)
    run: FinetuneRun = field(default_factory=FinetuneRun)

    def __post_init__(self) -> None:
        for key in ("schedule.by_epoch", "data.absent_as_zero"):
            section, name = key.split(".")
            if getattr(getattr(self, section), name) and self.task != "segmentation":
                raise ValueError(f"{key}=true is for segmentation, not for {self.task}: leave it out")
        if self.schedule.by_epoch and self.run.evaluate_every is not None:
            raise ValueError("schedule.by_epoch=true scores each epoch: leave out run.evaluate_every")


SECTIONS = [f.name for f in dataclasses.fields(FinetuneSettings) if f.name not in ("preset", "task")]


# ---- presets ---------------------------------------------------------------------------------------------------------

# As torchvision and Detectron2 train: running statistics of batch norm. They do not clip the gradient; where
# MMDetection clips, it is at this norm: it stops an explosion, and the norm of a usual step is below it.
_STANDARD: dict[str, Any] = {"optimizer": FinetuneOptimizer(clip_norm=35.0), "run": FinetuneRun(precise_bn=0)}
# As Revisiting trains: float32, running statistics of batch norm.
_REVISITING_RUN = FinetuneRun(precision="fp32", precise_bn=0)

PRESETS = {
    settings.preset: settings
    for settings in (
        # Detectron2's 1x schedule, with torchvision's heads and with the papers'.
        *(
            FinetuneSettings(
                name,
                task,
                DetectionImages(),
                network,
                schedule=FinetuneSchedule(steps=90_000, warmup_steps=1000),
                **others,
            )
            for task in TASKS
            if task != "segmentation"
            for name, network, others in (
                (f"{task}_1x", DetectionNetwork(), _STANDARD),
                (f"{task}_papers_1x", DetectionNetwork(head="conv"), {}),
            )
        ),
        # SlotCon's FCN on VOC 2012 (Wen et al., NeurIPS 2022).
        FinetuneSettings(
            "fcn_slotcon",
            "segmentation",
            RandomCrops(),
            SegmentationNetwork(align_corners=True),
            optimizer=FinetuneOptimizer(learning_rate=0.003),
            schedule=FinetuneSchedule(steps=30_000, warmup_steps=0, decay_at=(0.7, 0.9)),
        ),
        # Revisiting's FCN (Van Gansbeke et al., NeurIPS 2021), as their released code has it, on VOC 2012 ...
        FinetuneSettings(
            "fcn_revisiting_voc",
            "segmentation",
            SquashedImages(),
            SegmentationNetwork(bias=False, dilate_first=True),
            data=FinetuneData(train="trainaug", absent_as_zero=True),
            batch=FinetuneBatch(16),
            optimizer=FinetuneOptimizer(learning_rate=0.003, decay_all=True),
            # "epoch > 30" and "> 40", counted from 0: lower starting at the 32nd and the 42nd epoch.
            schedule=FinetuneSchedule(epochs=45, warmup_steps=0, decay_at=(31 / 45, 41 / 45), by_epoch=True),
            run=_REVISITING_RUN,
        ),
        # ... and on Cityscapes.
        FinetuneSettings(
            "fcn_revisiting_cityscapes",
            "segmentation",
            SteppedCrops(),
            SegmentationNetwork(dilation=1, bias=False, dilate_first=True),
            data=FinetuneData(train="train", absent_as_zero=True),
            batch=FinetuneBatch(8),
            optimizer=FinetuneOptimizer("adam", learning_rate=1e-4, decay_all=True),
            schedule=FinetuneSchedule(epochs=150, warmup_steps=0, decay="polynomial", by_epoch=True),
            run=_REVISITING_RUN,
        ),
    )
}


FORMER = {"fcn_voc": "fcn_revisiting_voc", "fcn_cityscapes": "fcn_revisiting_cityscapes"}
"""Presets of version 0.1 that differed from the protocol of the paper they were named after, and their replacements."""


def read_settings(task: Task, overrides: Sequence[str], preset: str | None = None) -> FinetuneSettings:
    """A preset's settings with `section.key=value` on top, each value read as YAML.

    The length of the schedule stays null if no override sets it: `schedule.plan` takes the preset's, scaled with
    the batch.

    Args:
        preset: one of `PRESETS`; by default the task's first.

    Raises:
        ValueError: no such preset for the task, an override that cannot be read, an unknown key, a value of another
            type or out of range.
    """
    known = [name for name, settings in PRESETS.items() if settings.task == task]
    name = preset or known[0]
    if name in FORMER:
        raise ValueError(f"--preset {name} was removed: give --preset {FORMER[name]}, which is the paper's protocol")
    if name not in known:
        raise ValueError(
            f"--preset {name}{nearest(name, known)} is not one of {task}'s presets: choose {' or '.join(known)}"
        )
    settings = PRESETS[name]
    settings = dataclasses.replace(
        settings, schedule=dataclasses.replace(settings.schedule, steps=None, epochs=None, warmup_steps=None)
    )
    changes = read_overrides(overrides, SECTIONS)
    adaptive = changes.get("optimizer", {}).get("name")
    if settings.optimizer.name == "sgd" and adaptive in ("adam", "adamw"):
        usual = {"learning_rate": 1e-4} | ({"weight_decay": 0.05} if adaptive == "adamw" else {})
        changes["optimizer"] = usual | changes["optimizer"]
    changed = {}
    for section, values in changes.items():
        current = getattr(settings, section)
        changed[section] = build(type(current), plain(current) | values, section, within=f"for {task}, ")
    return dataclasses.replace(settings, **changed)


def as_sections(settings: FinetuneSettings) -> dict[str, Any]:
    """The settings as plain data, with all defaults."""
    sections = {section: plain(getattr(settings, section)) for section in SECTIONS}
    return {"preset": settings.preset, "task": settings.task} | sections


def rule(settings: FinetuneSettings) -> str:
    """The preset's name, or `changed` if a setting that affects the figures differs from the preset."""
    preset = as_sections(read_settings(settings.task, [], settings.preset))
    changed = typed.differences(preset, as_sections(settings), FREE | {"run.seed"})
    return CHANGED if changed else settings.preset


AMENDABLE = {
    *(
        f"optimizer.{field.name}"
        for field in dataclasses.fields(FinetuneOptimizer)
        if field.name not in ("name", "ema")
    ),
    *(f"schedule.{field.name}" for field in dataclasses.fields(FinetuneSchedule)),
    "run.precision",
}
"""Settings that `run.amend` may change when a run resumes."""


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """The differences that make two `as_sections` different runs: `section.key: old -> new`.

    Args:
        free: additional settings that may differ.
    """
    return typed.differences(old, new, FREE.union(free))
