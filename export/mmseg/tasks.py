"""The three tasks of the configs in SlotCon's repository (Wen et al., NeurIPS 2022), for MMSegmentation 1.x.

VOC and Cityscapes use MoCo's networks (He et al., CVPR 2020). ADE20K uses MMSegmentation's own FCN of stride 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Normalization = Literal["slotcon", "imagenet"]


@dataclass(frozen=True)
class Task:
    """One protocol; all three have 16 images per iteration."""

    text: str
    layout: str
    """Layout of the data, one of `layouts.LAYOUTS`."""
    classes: int
    crop: int
    """Side in pixels."""
    scale: tuple[int, int]
    """The longer and the shorter side that an image is fitted into; in training they are multiplied by 0.5 to 2."""
    iterations: int
    learning_rate: float
    weight_decay: float
    scheduler: Mapping[str, Any]
    """MMEngine's scheduler, by iterations."""
    normalization: Normalization
    """`imagenet`: the mean and standard deviation that the backbone was trained with. `slotcon`: the same numbers for
    pixels of 0 to 1, although pixels are 0 to 255, as also in MoCo's configs."""
    strides: tuple[int, ...] = (1, 2, 2, 1)
    dilations: tuple[int, ...] = (1, 1, 1, 2)
    head: Mapping[str, Any] = field(default_factory=dict)
    """The head's differences from MoCo's two convolutions of dilation 6 and 256 channels."""
    auxiliary: bool = False
    """Whether a second, smaller head is trained on the last stage but one."""
    train_changes: tuple[Mapping[str, Any], ...] = ()
    """Pipeline steps of training images before they are packed."""
    cat_max_ratio: float = 1.0
    """Maximum fraction of a crop's pixels of one class, if one of ten tries satisfies it."""
    test: Mapping[str, Any] = field(default_factory=lambda: {"mode": "whole"})


def _steps(*milestones: int) -> dict[str, Any]:
    return {"type": "MultiStepLR", "by_epoch": False, "milestones": list(milestones), "gamma": 0.1}


TASKS: Mapping[str, Task] = {
    "voc12aug": Task(
        text="VOC 2012, train and aug -> val: 513 pixels, 30k iterations, learning rate 0.003",
        layout="voc",
        classes=21,
        crop=513,
        scale=(2049, 513),
        iterations=30_000,
        learning_rate=0.003,
        weight_decay=1e-4,
        scheduler=_steps(21_000, 27_000),
        normalization="slotcon",
    ),
    "cityscapes": Task(
        text="Cityscapes, train -> val: 769 pixels, 90k iterations, learning rate 0.01",
        layout="cityscapes",
        classes=19,
        crop=769,
        scale=(2049, 1025),
        iterations=90_000,
        learning_rate=0.01,
        weight_decay=1e-4,
        scheduler=_steps(63_000, 81_000),
        normalization="slotcon",
        test={"mode": "slide", "crop_size": (769, 769), "stride": (513, 513)},
    ),
    "ade20k": Task(
        text="ADE20K, train -> val: 512 pixels, 80k iterations, learning rate 0.01",
        layout="ade20k",
        classes=150,
        crop=512,
        scale=(2048, 512),
        iterations=80_000,
        learning_rate=0.01,
        weight_decay=5e-4,
        scheduler={"type": "PolyLR", "by_epoch": False, "power": 0.9, "eta_min": 1e-4, "begin": 0, "end": 80_000},
        normalization="imagenet",
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        head={"channels": 512, "concat_input": True, "dropout_ratio": 0.1, "dilation": 1, "align_corners": False},
        auxiliary=True,
        train_changes=({"type": "PhotoMetricDistortion"},),
        cat_max_ratio=0.75,
    ),
}


@dataclass(frozen=True)
class Order:
    """The request of a command."""

    task: str
    backbone: str
    data: Path | None
    """The folder of data sets; None to write only config and weights."""
    out: Path
    gpus: int | None
    """Number of GPUs; None for all that PyTorch sees."""
    runs: int
    normalization: Normalization | None
    overrides: tuple[str, ...]

    @property
    def config(self) -> Path:
        return self.out / f"{self.task}.py"

    @property
    def weights(self) -> Path:
        return self.out / "backbone.pth"
