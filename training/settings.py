"""The sections of a recipe, each a frozen dataclass; the notes on the fields are the documentation of the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from clove_hub.data.bands import Reading
from clove_hub.settings import PathText, require_at_least, require_minutes
from clove_hub.weights.weights import LEAST_STD

from .optimizer import require_optimizer


@dataclass(frozen=True)
class BackboneSettings:
    model: str = "resnet50"
    """An architecture of timm that returns a feature map, without a tag."""
    pretrained: PathText | None = None
    """Weights to start from, for student and teacher; the heads are new. Without `evaluate`, `correspond` on the images
    shows whether that helps. A timm tag (`a1_in1k`), a run, a bundle, a file,
    hf-hub:organization/name; whatever `clove-hub inspect` accepts. Images are normalized as these weights expect."""
    args: dict[str, Any] = field(default_factory=dict)
    """Additional arguments of `timm.create_model`: {drop_path_rate: 0.1}, {img_size: 96}."""
    level: int = -1
    """The feature map that is trained: -1 is the network's last; -2, -3, ... are the maps before it, finer in a
    network with stages, earlier blocks in a vision transformer. Later layers keep their initial weights."""
    freeze: int = 0
    """Number of first blocks that keep their weights and statistics, as timm counts them; the stem is the first."""
    freeze_norm: bool = False
    """Whether batch norms use and keep the statistics of `pretrained`; the statistics of augmented views differ, and
    that alone degrades the features of plain photos. Scales and shifts are trained."""
    grad_checkpointing: bool = False
    """Recompute blocks in the backward pass instead of storing their activations: less memory, less speed."""
    zero_init_last: bool = True
    """Whether the last norm of a residual branch is initialized with scale 0, as in timm, or 1, as in torchvision."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "backbone", "freeze")
        if self.freeze_norm and self.pretrained is None:
            raise ValueError(
                "backbone.freeze_norm=true keeps the statistics of trained weights, but backbone.pretrained names none: give "
                "it, or set backbone.freeze_norm=false"
            )


@dataclass(frozen=True)
class DataSettings:
    """The source of the images, and the number of processes that read them."""

    path: PathText | tuple[PathText, ...]
    """A folder, or a list of folders that form one source; a data set's id on the Hub or its path; tar files such as
    shards/{000..099}.tar."""
    source: str = "folder"
    """`folder`, `huggingface` or `shards`."""
    split: str = "train"
    """Split of a data set."""
    column: str = "image"
    """Column of a data set; for shards the suffix of the member, or `image` for any image suffix."""
    subset: str | None = None
    """Configuration of a data set that has several."""
    streaming: bool = False
    """Read a data set while it downloads, in its stored order."""
    length: int | None = None
    """Images per epoch of a stream, if the data set does not state it."""
    workers: int | Literal["auto"] = "auto"
    """Data-loading workers of each training process. `auto`: its share of the cores minus one, 16 at most."""
    cache: bool = False
    """Keep decoded images in memory after their first use; for data sets that fit."""
    skip: tuple[tuple[int, int], ...] | None = None
    """Batches to skip: [[first, last], ...]. Counted from 1, as steps are if none is skipped."""
    draft: Literal["auto"] | int | None = None
    """Decode a JPEG at 1/2, 1/4 or 1/8 of its size if its short side stays this long (512), and read a TIFF of more
    than 89 megapixels from its smallest resolution with such a short side. `auto` is the length at which the smallest
    crop still has as many pixels as its view, which matters for camera photos. Null for all pixels."""
    bands: int = 3
    """Bands of an image: 1 for gray, 3 for RGB, 4 for RGB and near infrared, 12, ... Other files count as broken."""
    depth: Literal[8, 16] | None = None
    """Bits per value: 8, as in photos, or 16; null for 8 with three bands and 16 otherwise."""
    mean: tuple[float, ...] | None = None
    """Mean of each band, where white is 1, as for `std`. Null for ImageNet's with photos; with other images for the
    values that `clove-hub check --bands` measured and stored in the folder."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each band."""

    def __post_init__(self) -> None:
        if not self.path or not all(self.path):
            raise ValueError("data.path is empty: give the folder, the data set or the tar files to train on")
        kinds = ("folder", "huggingface", "shards")
        if self.source not in kinds:
            raise ValueError(f"data.source={self.source!r}: choose one of {', '.join(kinds)}")
        if not isinstance(self.path, str) and self.source != "folder":
            raise ValueError(
                f"data.path={list(self.path)}: several paths are for data.source=folder, not for {self.source!r}; "
                "give one path"
            )
        for key in ("streaming", "subset"):
            if getattr(self, key) and self.source != "huggingface":
                raise ValueError(f"data.{key} is for data.source=huggingface, not for {self.source!r}: leave it out")
        if self.workers != "auto" and self.workers < 0:
            raise ValueError(f"data.workers={self.workers}: must be auto, 0 (read in the training process) or more")
        if self.length is not None and self.length < 1:
            raise ValueError(f"data.length={self.length}: must be at least 1")
        if self.length is not None and not self.streaming:
            raise ValueError("data.length is for data.streaming=true; any other source is counted: leave it out")
        if self.cache and self.streaming:
            raise ValueError(
                "data.cache keeps images by their number, but a stream (data.streaming=true) has no numbers: leave one out"
            )
        for first, last in self.skip or ():
            if not 1 <= first <= last:
                raise ValueError(f"data.skip=[[{first}, {last}]]: give the first and the last batch, counted from 1")
        if isinstance(self.draft, int) and self.draft < 1:
            raise ValueError(f"data.draft={self.draft}: must be at least 1, the shortest side in pixels, such as 512")

        require_at_least(1, self, "data", "bands")
        _require_statistics(self.mean, self.std, self.bands)

    @property
    def reading(self) -> Reading:
        """The bands and the depth that images are decoded to, at their full size."""
        return Reading(self.bands, self.depth or (8 if self.bands == 3 else 16))

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else list(self.path)

    @property
    def only_path(self) -> str:
        """The path of a source with a single path."""
        assert isinstance(self.path, str)
        return self.path


def _require_statistics(mean: Sequence[float] | None, std: Sequence[float] | None, bands: int) -> None:
    """Raise ValueError unless `data.mean` and `data.std` are both null, or have a usable number for each band."""
    if mean is None or std is None:
        if mean is not std:
            raise ValueError("data.mean and data.std: give both or neither")
        return
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != bands:
            raise ValueError(f"data.{key}={list(values)}: give a number for each of data.bands={bands}")
    if min(mean) < 0 or max(mean) > 1:
        raise ValueError(f"data.mean={list(mean)}: expected numbers from 0 to 1, which is the largest value of a file")
    if min(std) < LEAST_STD:
        raise ValueError(
            f"data.std={list(std)}: expected at least {LEAST_STD:g}, where 1 is the largest value of a file"
        )


@dataclass(frozen=True)
class BatchSettings:
    total: int = 2048
    """Images per optimizer step, over all processes. Fixed by the recipe, whatever it runs on."""
    per_device: int | Literal["auto"] = 256
    """Maximum images per forward pass of a process; gradient accumulation follows from it. `auto` tries for the most
    that fit in memory; a run that resumes keeps the number. It affects only speed, except for methods with a queue (see
    their pages)."""
    norm_group: int | None = None
    """Images that share batch-norm statistics, with all their views of one size that a method passes together; null for
    all of a step. It is part of the training, whatever it runs on: a group is part of a process's images, or spans
    processes. No effect without batch norm."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "batch", "total", "per_device")
        require_at_least(2, self, "batch", "norm_group")


@dataclass(frozen=True)
class OptimizerSettings:
    name: str = "lars"
    """lars, sgd, or an optimizer of timm: adamw, lamb, lion, nadamw, ..."""
    learning_rate: float = 1.0
    """Peak learning rate for 256 images; multiplied by batch.total / 256."""
    backbone_rate: float = 1.0
    """Factor of the learning rate for the backbone; the heads have the full rate."""
    layer_decay: float = 1.0
    """Factor of the learning rate per block, from the last to the stem (BEiT's; 0.65 to 0.9 when starting from trained
    weights)."""
    weight_decay: float = 2e-5
    """Not for biases and norm scales, unless `decay_all`; nor for what timm excludes, such as position embeddings."""
    decay_all: bool = False
    """Whether weight decay also applies to biases and norm scales."""
    momentum: float = 0.9
    """Momentum of the optimizer."""
    betas: tuple[float, ...] | None = None
    """For Adam-type optimizers: decay of the mean and the mean square; null for the default, mostly 0.9 and 0.999."""
    trust: float = 0.001
    """Trust coefficient; LARS only."""
    eps: float = 1e-8
    """Added to the denominator: the gradient's norm in LARS (0 in SlotCon's), the root of the mean square in Adam."""
    clip_norm: float | None = None
    """Maximum norm of the gradient of all parameters; null for no clipping."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "optimizer", "learning_rate", "weight_decay", "momentum", "trust", "eps")
        require_optimizer(self.name)
        for key in ("backbone_rate", "layer_decay"):
            if not 0 < getattr(self, key) <= 1:
                raise ValueError(f"optimizer.{key}={getattr(self, key)}: must be above 0 and at most 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"optimizer.clip_norm={self.clip_norm}: must be above 0, or null")
        if not all(0 <= beta < 1 for beta in self.betas or ()):
            raise ValueError(f"optimizer.betas={list(self.betas or ())}: each must be at least 0 and below 1")


@dataclass(frozen=True)
class ScheduleSettings:
    epochs: float = 200
    """Passes over the images. `steps`, if given, overrides it."""
    steps: int | None = None
    """Optimizer steps; null for as many as `epochs` gives."""
    warmup_epochs: float | Literal["auto"] = 5
    """Epochs over which the learning rate rises linearly. `auto`: 5, but at most a tenth of the run."""
    warmup_to_peak: bool = True
    """Whether the last warm-up step is at the peak, as in CLoVE, or the step after it, as in SlotCon and PixPro."""
    decay: Literal["step", "epoch"] = "step"
    """Whether the learning rate then falls with each step or, as in MoCo, with each epoch."""
    start_factor: float = 0.01
    """The learning rate at the first step, as a factor of the peak."""
    final_factor: float = 0.01
    """The learning rate at the end, as a factor of the peak."""
    final_weight_decay: float | None = None
    """Final weight decay, reached from optimizer.weight_decay along half a cosine; null keeps it constant."""
    teacher_momentum: float = 0.99
    """Momentum of the teacher's moving average at the first step."""
    final_teacher_momentum: float = 1.0
    """The momentum at the end, reached along half a cosine. Equal to `teacher_momentum`, it is constant."""

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise ValueError(f"schedule.epochs={self.epochs}: must be above 0")
        require_at_least(1, self, "schedule", "steps")
        require_at_least(0, self, "schedule", "warmup_epochs", "final_weight_decay")
        for key in ("teacher_momentum", "final_teacher_momentum"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"schedule.{key}={getattr(self, key)}: must be between 0 and 1")


@dataclass(frozen=True)
class RunSettings:
    output: PathText = ""
    """The run's folder. A stopped run resumes when it is started again with the same folder."""
    init_from: PathText | None = None
    """Start from the method's state in another run's folder, `hf-hub:organization/name` or a released checkpoint."""
    seed: int = 0
    """Seed of everything random in the run."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of the forward pass; weights, loss and optimizer stay float32."""
    channels_last: bool = True
    """Memory format of images and weights: faster on most accelerators."""
    compile: bool = False
    """torch.compile of student and teacher."""
    profile: bool = False
    """Trace steps 10 to 20 with torch.profiler into the run's folder."""
    log_every: int = 10
    """Steps between two rows of metrics.jsonl."""
    save_every: int = 1000
    """Steps between two checkpoints. A run that is stopped or fails is also saved after its last complete step."""
    keep: int = 2
    """Number of newest valid checkpoints to keep."""
    amend: bool = False
    """Resume a run although optimizer, schedule, precision or data.skip changed; the run records what and when."""
    timeout: float = 30.0
    """Minutes that a process waits for another one, or for its data-loading workers."""
    trackers: tuple[str, ...] = ()
    """Any tracker of Accelerate: tensorboard, wandb, trackio, ..."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "run", "log_every", "save_every", "keep")
        require_minutes(self)


@dataclass(frozen=True)
class Evaluation:
    """One entry of the list `evaluate`: a measurement during the run. It never changes the run."""

    protocol: str
    """A protocol of `clove-hub evaluate`."""
    data: PathText
    """The folder that the protocol reads."""
    every: int
    """Steps between two evaluations; one more runs before the first step and one after the last."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the protocol that differ from its defaults, by name."""
    seed: int = 0
    """Seed of everything random in the protocol."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"evaluate: every={self.every} of {self.protocol}: must be at least 1")
