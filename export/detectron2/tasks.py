"""The seven tasks: which file of Detectron2's model zoo each starts from, and what the paper changes in it.

What the figures mean and what others reached is in `model_cards/protocols.yaml`, by the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXTRA_NORM_HEAD = "Res5ExtraNormROIHeads"
"""Registered by `heads`."""
C4 = {"MODEL.ROI_HEADS.NAME": EXTRA_NORM_HEAD}
SYNC_BN = {"MODEL.RESNETS.NORM": "SyncBN"}
PRECISE_BN = {"TEST.PRECISE_BN.ENABLED": True}
DENSEPOSE = "densepose"
"""The package of Detectron2's DensePose project."""
BOXES = {"AP": "APbb", "AP50": "AP50bb", "AP75": "AP75bb"}
MASKS = {"AP": "APmk", "AP50": "AP50mk", "AP75": "AP75mk"}


@dataclass(frozen=True)
class Task:
    """One protocol. Everything that is not said here is as in the zoo's file."""

    zoo: str
    """The file, as `model_zoo.get_config_file` names it; for DensePose in the project's own folder of configs."""
    layout: str
    """Of the data: one of `layouts.LAYOUTS`."""
    changes: Mapping[str, Any]
    """What the protocol sets, by Detectron2's keys. Weights and images come from the backbone (`convert.py`)."""
    metrics: Mapping[str, Mapping[str, str]]
    """For each of Detectron2's groups of figures, our names of those that are reported."""
    seconds: float | None
    """That Detectron2 reports for an iteration of the zoo's file on 8 V100; None where it reports none for this one."""
    of_the_truth: Mapping[str, float] = field(default_factory=dict)
    """By group, the least figure that the truth itself has on a few images, where it is not 90."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """That Detectron2 needs for this task alone: module, and where it comes from."""

    @property
    def densepose(self) -> bool:
        return DENSEPOSE in self.packages


@dataclass(frozen=True)
class Order:
    """What was asked for."""

    task: str
    backbone: str
    data: Path
    """Detectron2's DETECTRON2_DATASETS."""
    out: Path
    gpus: int | None
    """None for all that PyTorch sees."""
    runs: int
    overrides: tuple[str, ...]
    fraction: float

    @property
    def weights(self) -> Path:
        return self.out / "backbone.pth"


TASKS: Mapping[str, Task] = {
    "coco_c4": Task(
        zoo="COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
        layout="coco",
        changes=C4 | SYNC_BN | PRECISE_BN,
        metrics={"bbox": BOXES, "segm": MASKS},
        seconds=0.584,
    ),
    "coco_fpn": Task(
        zoo="COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        layout="coco",
        changes=SYNC_BN
        | PRECISE_BN
        | {
            "MODEL.FPN.NORM": "SyncBN",
            "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
            "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
            "MODEL.ROI_BOX_HEAD.NORM": "SyncBN",
            "MODEL.ROI_MASK_HEAD.NORM": "SyncBN",
        },
        metrics={"bbox": BOXES, "segm": MASKS},
        seconds=0.261,
    ),
    "lvis_fpn": Task(
        zoo="LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        layout="lvis",
        changes={"SOLVER.BASE_LR": 0.001},  # as the paper says; the zoo's file has 0.02. Batch norm stays frozen.
        metrics={"bbox": BOXES, "segm": MASKS},
        seconds=None,
        packages={"lvis": "https://github.com/lvis-dataset/lvis-api (pip install lvis)"},
    ),
    "cityscapes_fpn": Task(
        zoo="Cityscapes/mask_rcnn_R_50_FPN.yaml",
        layout="cityscapes",
        changes={"SOLVER.IMS_PER_BATCH": 32, "SOLVER.BASE_LR": 0.01},
        metrics={"segm": {"AP": "APmk", "AP50": "AP50mk"}},
        seconds=None,  # the zoo's file has 8 images in an iteration
        packages={
            "cityscapesscripts": "https://github.com/mcordts/cityscapesScripts (pip install cityscapesscripts)",
            "shapely": "https://shapely.readthedocs.io (pip install shapely)",
        },
    ),
    "coco_keypoints": Task(
        zoo="COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
        layout="coco_keypoints",
        changes=SYNC_BN | {"SOLVER.BASE_LR": 0.02},
        metrics={"keypoints": {"AP": "APkp", "AP50": "AP50kp", "AP75": "AP75kp"}},
        seconds=0.315,
    ),
    "voc_c4": Task(
        zoo="PascalVOC-Detection/faster_rcnn_R_50_C4.yaml",
        layout="voc",
        changes=C4
        | SYNC_BN
        | PRECISE_BN
        | {"SOLVER.MAX_ITER": 24000, "SOLVER.STEPS": (18000, 22000), "SOLVER.WARMUP_ITERS": 100},
        metrics={"bbox": BOXES},
        of_the_truth={"bbox": 1.0},  # a class that no image shows counts as 0
        seconds=0.537,
    ),
    "densepose_fpn": Task(
        zoo="densepose_rcnn_R_50_FPN_s1x.yaml",
        layout="densepose",
        changes=SYNC_BN,
        metrics={
            "bbox": {"AP": "APbb"},
            "densepose_gps": {"AP": "APgps"},
            "densepose_gpsm": {"AP": "APgpsm"},
            "densepose_segm": {"AP": "APmk"},
        },
        # A detector cannot say all that is known of a surface: only that these are figures can be seen.
        of_the_truth={"densepose_gps": 0.0, "densepose_gpsm": 0.0},
        seconds=0.359,
        packages={
            DENSEPOSE: "https://github.com/facebookresearch/detectron2/tree/main/projects/DensePose, "
            "whose folder of configs must lie beside the package: install it from a copy of the repository (pip install -e)"
        },
    ),
}
