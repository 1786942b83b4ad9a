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
    """An architecture of timm that yields a feature map, without a tag."""
    pretrained: PathText | None = None
    """Weights to go on from, for student and teacher; the heads are new. Without `evaluate`, `correspond` on the images shows
    whether that helps. A tag of timm's (`a1_in1k`), a run, a bundle, a file,
    hf-hub:organization/name; whatever `clove-hub inspect` takes. Images are normalized as these weights want them."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `timm.create_model`: {drop_path_rate: 0.1}, {img_size: 96}."""
    level: int = -1
    """The feature map that is trained: -1 is what the network ends with; -2, -3, ... are the maps before it, finer in a
    network of stages, earlier blocks in a vision transformer. What lies behind it stays as it begins."""
    freeze: int = 0
    """How many of the first blocks keep their weights and statistics, as timm counts them from the stem, which is the first."""
    freeze_norm: bool = False
    """Whether batch norms use and keep the statistics of `pretrained`; those of augmented views are others, and alone cost what
    the weights know of plain photos. Scales and shifts are trained."""
    grad_checkpointing: bool = False
    """Compute blocks a second time in the backward pass instead of keeping their results: less memory, less speed."""
    zero_init_last: bool = True
    """Whether a residual branch begins with scale 0 in its last norm, as in timm, or with 1, as in torchvision."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "backbone", "freeze")
        if self.freeze_norm and self.pretrained is None:
            raise ValueError(
                "backbone.freeze_norm=true keeps the statistics of trained weights, and backbone.pretrained names none: give "
                "it, or set backbone.freeze_norm=false"
            )


@dataclass(frozen=True)
class DataSettings:
    """Where the images come from, and how many processes read them."""

    path: PathText | tuple[PathText, ...]
    """A folder, or a list of folders that are one source together; a data set's id on the Hub or its path; tar files such
    as shards/{000..099}.tar."""
    source: str = "folder"
    """`folder`, `huggingface` or `shards`."""
    split: str = "train"
    """Of a data set."""
    column: str = "image"
    """Of a data set; of shards the ending of the member, or `image` for whichever is one."""
    subset: str | None = None
    """The configuration of a data set that has several."""
    streaming: bool = False
    """Read a data set while it downloads, in the order in which it comes."""
    length: int | None = None
    """Images of an epoch of a stream, where the data set does not say."""
    workers: int | Literal["auto"] = "auto"
    """Processes that read and crop, for each training process. `auto`: its share of the cores but one, 16 at most."""
    cache: bool = False
    """Keep decoded images in memory, each from its first use on; for sets that fit."""
    skip: tuple[tuple[int, int], ...] | None = None
    """Batches that are left out: [[first, last], ...]. Counted from 1, as steps are where none is left out."""
    draft: Literal["auto"] | int | None = None
    """Decode a JPEG at 1/2, 1/4 or 1/8 of its size where its short side stays this long (512), and read a TIFF of more than
    89 megapixels from the smallest of its resolutions whose short side is. `auto` is the length at which the smallest crop
    still has as many pixels as its view: it concerns photos of cameras. Null for all pixels."""
    bands: int = 3
    """Of an image: 1 for gray, 3 for colors, 4 for RGB with near infrared, 12, ... Files with others count as broken."""
    depth: Literal[8, 16] | None = None
    """Bits of a value that are kept: 8, as photos have, or 16; null for 8 of three bands and 16 of others."""
    mean: tuple[float, ...] | None = None
    """Of each band, where white is 1, as `std`. Null for ImageNet's of photos; of others for what `clove-hub check --bands`
    has measured and stored in the folder."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each band."""

    def __post_init__(self) -> None:
        if not self.path or not all(self.path):
            raise ValueError("data.path is empty; give the folder, the data set or the tar files to train on")
        kinds = ("folder", "huggingface", "shards")
        if self.source not in kinds:
            raise ValueError(f"data.source={self.source!r} is not known; use one of {', '.join(kinds)}")
        if not isinstance(self.path, str) and self.source != "folder":
            raise ValueError(
                f"data.path={list(self.path)}: several paths are for data.source=folder, not for {self.source!r}; "
                "give one path"
            )
        for key in ("streaming", "subset"):
            if getattr(self, key) and self.source != "huggingface":
                raise ValueError(f"data.{key} is for data.source=huggingface, not for {self.source!r}")
        if self.workers != "auto" and self.workers < 0:
            raise ValueError(f"data.workers={self.workers}; use auto, 0 (read in the training process) or more")
        if self.length is not None and self.length < 1:
            raise ValueError(f"data.length={self.length}; an epoch has at least one image")
        if self.length is not None and not self.streaming:
            raise ValueError("data.length is for data.streaming=true; every other source is counted")
        if self.cache and self.streaming:
            raise ValueError(
                "data.cache keeps images by their number, which a stream (data.streaming=true) has none of"
            )
        for first, last in self.skip or ():
            if not 1 <= first <= last:
                raise ValueError(f"data.skip=[[{first}, {last}]]: give the first and the last batch, counted from 1")
        if isinstance(self.draft, int) and self.draft < 1:
            raise ValueError(f"data.draft={self.draft}; it is the shortest side in pixels that is enough, such as 512")

        require_at_least(1, self, "data", "bands")
        _require_statistics(self.mean, self.std, self.bands)

    @property
    def reading(self) -> Reading:
        """What the images are decoded into, at their full size."""
        return Reading(self.bands, self.depth or (8 if self.bands == 3 else 16))

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else list(self.path)

    @property
    def only_path(self) -> str:
        """The path of a source that has just one."""
        assert isinstance(self.path, str)
        return self.path


def _require_statistics(mean: Sequence[float] | None, std: Sequence[float] | None, bands: int) -> None:
    """Raises ValueError unless `data.mean` and `data.std` are both null, or have a usable number for each band."""
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
    """Images in one optimizer step, over all processes. Fixed by the recipe, whatever it runs on."""
    per_device: int | Literal["auto"] = 256
    """Images in one forward pass of one process, at most; the steps of accumulation follow from it. `auto` finds the most
    that fit in memory, by trying; a run that resumes keeps them. Speed alone depends on it, but for methods with a queue
    (see their pages)."""
    norm_group: int | None = None
    """Images that share the statistics of batch norm, with all their views of a size that a method passes together; null for
    all of a step. Part of what is trained, whatever it runs on: as parts of a process's images, or over several processes.
    Without effect where nothing normalizes over a batch."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "batch", "total", "per_device")
        require_at_least(2, self, "batch", "norm_group")


@dataclass(frozen=True)
class OptimizerSettings:
    name: str = "lars"
    """lars, sgd, or one of timm's: adamw, lamb, lion, nadamw, ..."""
    learning_rate: float = 1.0
    """At the peak, for 256 images; multiplied with batch.total / 256."""
    backbone_rate: float = 1.0
    """The backbone's share of the learning rate; the heads have the whole."""
    layer_decay: float = 1.0
    """What the rate of each block is multiplied with on the way from the last to the stem (BEiT's; 0.65 to 0.9 where one goes on
    from trained weights)."""
    weight_decay: float = 2e-5
    """Not of biases and the scales of norms, unless `decay_all`; nor of what timm names, such as position embeddings."""
    decay_all: bool = False
    """Whether biases and the scales of norms decay too."""
    momentum: float = 0.9
    """Of the optimizer."""
    betas: tuple[float, ...] | None = None
    """Of Adam and its kind: decay rates of the mean and the mean square; null for the optimizer's own, mostly 0.9 and 0.999."""
    trust: float = 0.001
    """LARS's trust coefficient; the others have none."""
    eps: float = 1e-8
    """Added to what is divided by: the gradient's norm in LARS (SlotCon's has 0), the root of the mean square in Adam."""
    clip_norm: float | None = None
    """Scale the gradient of all parameters together down to this length where it is longer."""

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
    """Passes over the images. `steps`, where given, overrides it."""
    steps: int | None = None
    """Optimizer steps; null for as many as `epochs` take."""
    warmup_epochs: float | Literal["auto"] = 5
    """Passes over which the learning rate rises in a straight line. `auto`: 5, but at most a tenth of the run."""
    warmup_to_peak: bool = True
    """Whether the last step of these is at the peak already, as in CLoVE; or the next one, as in SlotCon and PixPro."""
    decay: Literal["step", "epoch"] = "step"
    """Whether the learning rate then falls with each step or, as in MoCo, with each pass over the images."""
    start_factor: float = 0.01
    """The learning rate's share of the peak at the first step, and ..."""
    final_factor: float = 0.01
    """... at the end."""
    final_weight_decay: float | None = None
    """optimizer.weight_decay moves to this along half a cosine; null keeps it."""
    teacher_momentum: float = 0.99
    """Of the teacher's moving average at the first step; rises to ..."""
    final_teacher_momentum: float = 1.0
    """... this, along half a cosine. The same as the first keeps it constant."""

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise ValueError(f"schedule.epochs={self.epochs}: must be above 0")
        require_at_least(1, self, "schedule", "steps")
        require_at_least(0, self, "schedule", "warmup_epochs", "final_weight_decay")
        for key in ("teacher_momentum", "final_teacher_momentum"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"schedule.{key}={getattr(self, key)}: must lie between 0 and 1")


@dataclass(frozen=True)
class RunSettings:
    output: PathText = ""
    """The run's folder. A run that was stopped goes on when it is started again with the same one."""
    init_from: PathText | None = None
    """Begin with the method's state in another run's folder, in `hf-hub:organization/name` or in a released checkpoint."""
    seed: int = 0
    """From which all that is random follows."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of the forward pass; weights, loss and optimizer stay float32."""
    channels_last: bool = True
    """Memory format of images and weights: faster on most accelerators."""
    compile: bool = False
    """torch.compile of student and teacher."""
    profile: bool = False
    """Trace steps 10 to 20 with torch.profiler into the run's folder."""
    log_every: int = 10
    """Steps between two rows of metrics.jsonl."""
    save_every: int = 1000
    """Steps between two checkpoints. A run that is stopped or fails is saved after its last whole step besides."""
    keep: int = 2
    """How many of the newest good checkpoints stay."""
    amend: bool = False
    """Go on with a run although optimizer, schedule, precision or data.skip were changed; the run records what and when."""
    timeout: float = 30.0
    """Minutes after which a process gives up waiting for another one, or for its data-loading workers."""
    trackers: tuple[str, ...] = ()
    """Any of Accelerate's: tensorboard, wandb, trackio, ..."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "run", "log_every", "save_every", "keep")
        require_minutes(self)


@dataclass(frozen=True)
class Evaluation:
    """One entry of the list `evaluate`: what to measure while the run goes on. It never changes the run."""

    protocol: str
    """One of `clove-hub evaluate`'s."""
    data: PathText
    """The folder that the protocol reads."""
    every: int
    """Steps between two evaluations; there is one before the first step and one after the last besides."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The protocol's that differ from its own, by name."""
    seed: int = 0
    """From which all that is random in the protocol follows."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"evaluate: every={self.every} of {self.protocol}: must be at least 1")
