"""The seven tasks: the file of Detectron2's model zoo that each starts from, and the paper's changes to it.

The meaning of the figures and published results are in `model_cards/protocols.yaml`, under the same names.
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
    """One protocol. Everything else is as in the zoo's file."""

    zoo: str
    """The file's name for `model_zoo.get_config_file`; for DensePose in the project's folder of configs."""
    layout: str
    """Layout of the data: one of `layouts.LAYOUTS`."""
    changes: Mapping[str, Any]
    """The protocol's settings, by Detectron2's keys. Weights and preprocessing come from the backbone
    (`convert.py`)."""
    metrics: Mapping[str, Mapping[str, str]]
    """For each of Detectron2's groups of figures, clove-hub's names of the reported ones."""
    seconds: float | None
    """Detectron2's reported time per iteration of the zoo's file on 8 V100; None if it reports none for this file."""
    of_the_truth: Mapping[str, float] = field(default_factory=dict)
    """By group, the minimum figure of the ground truth on a few images, if it is not 90."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Packages that Detectron2 needs only for this task: module, and where it comes from."""

    @property
    def densepose(self) -> bool:
        return DENSEPOSE in self.packages


@dataclass(frozen=True)
class Order:
    """The request of a command."""

    task: str
    backbone: str
    data: Path
    """Detectron2's DETECTRON2_DATASETS."""
    out: Path
    gpus: int | None
    """Number of GPUs; None for all that PyTorch sees."""
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
        changes={"SOLVER.BASE_LR": 0.001},  # as in the paper; the zoo's file has 0.02. Batch norm stays frozen.
        metrics={"bbox": BOXES, "segm": MASKS},
        seconds=None,
        packages={"lvis": "https://github.com/lvis-dataset/lvis-api (pip install lvis)"},
    ),
    "cityscapes_fpn": Task(
        zoo="Cityscapes/mask_rcnn_R_50_FPN.yaml",
        layout="cityscapes",
        changes={"SOLVER.IMS_PER_BATCH": 32, "SOLVER.BASE_LR": 0.01},
        metrics={"segm": {"AP": "APmk", "AP50": "AP50mk"}},
        seconds=None,  # the zoo's file has 8 images per iteration
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
        of_the_truth={"bbox": 1.0},  # a class without images counts as 0
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
        # A detector's output cannot express the full ground truth of a surface: check only that the figures exist.
        of_the_truth={"densepose_gps": 0.0, "densepose_gpsm": 0.0},
        seconds=0.359,
        packages={
            DENSEPOSE: "https://github.com/facebookresearch/detectron2/tree/main/projects/DensePose, "
            "whose folder of configs must lie beside the package: install it from a copy of the repository (pip install -e)"
        },
    ),
}
