"""The seven tasks' whole configs beside what was released, key by key: what differs is listed here, with the reason.

The files of Detectron2's zoo, and its defaults for the keys in question, were resolved once by Detectron2 0.6
(`detectron2_zoo.json`), so that no Detectron2 is needed; with one, what it resolves is compared with this too.
"""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from synthetic import trained

from clove_hub.export.detectron2.settings import settings
from clove_hub.export.detectron2.tasks import TASKS, Task
from clove_hub.settings import flat
from clove_hub.weights import Weights

ZOO = json.loads((Path(__file__).parent / "detectron2_zoo.json").read_text())
RELEASED = json.loads((Path(__file__).parents[1] / "golden" / "fcn_shapes.json").read_text())["detectron2"]
WEIGHTS = Path("/runs/backbone.pth")

BACKBONE = {
    "MODEL.WEIGHTS": (str(WEIGHTS), "the converted backbone, wherever it is"),
}
SEEN = BACKBONE | {
    "INPUT.FORMAT": ("RGB", "what the backbone was trained on, not Caffe's BGR"),
    "MODEL.PIXEL_MEAN": ([123.675, 116.28, 103.53], "what the backbone was trained with, not Caffe's"),
    "MODEL.PIXEL_STD": ([58.395, 57.12, 57.375], "what the backbone was trained with, not Caffe's"),
    "MODEL.RESNETS.STRIDE_IN_1X1": (False, "the backbone's strides are in its 3x3 convolutions"),
    "MODEL.BACKBONE.FREEZE_AT": (0, "CLoVE's paper fine-tunes all of the backbone"),
}
HEAD = {
    "MODEL.ROI_HEADS.NAME": (
        "Res5ExtraNormROIHeads",
        "the same layers as the released Res5ROIHeadsExtraNorm, under a name of ours",
    )
}
TRAINED_NORM = {"MODEL.RESNETS.NORM": ("SyncBN", "CLoVE's paper trains batch norm here")}

EXPLAINED: Mapping[str, Mapping[str, tuple[Any, str]]] = {
    # Against CLoVE's own files, which are PixPro's.
    "coco_c4": BACKBONE | HEAD,
    "coco_fpn": BACKBONE,
    "voc_c4": BACKBONE | HEAD,
    # Against the zoo's files: nobody released others for these.
    "lvis_fpn": SEEN | {"SOLVER.BASE_LR": (0.001, "CLoVE's paper says so")},
    "cityscapes_fpn": SEEN | {"SOLVER.IMS_PER_BATCH": (32, "CLoVE's paper says so")},
    "coco_keypoints": SEEN | TRAINED_NORM,
    "densepose_fpn": SEEN | TRAINED_NORM,
}
"""For each task the keys in which it differs from what was released: our value, and why."""
FILES = {
    "coco_c4": "CLoVE/COCO_R_50_C4_1x_PixPro",
    "coco_fpn": "CLoVE/COCO_R_50_FPN_1x_PixPro",
    "voc_c4": "CLoVE/Pascal_VOC_R_50_C4_24k_PixPro",
}


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted key, as JSON has them."""
    found: dict[str, Any] = json.loads(json.dumps(flat(values)))
    return found


def ours(task: Task) -> dict[str, Any]:
    """The zoo's file, the task's changes and the backbone's needs, one over the other."""
    needed = settings(Weights("made", "a made backbone", "file", "resnet50", {}), str(WEIGHTS))
    return ZOO["defaults"] | ZOO["zoo"][task.zoo] | json.loads(json.dumps(dict(task.changes))) | plain(needed)


def released(name: str) -> dict[str, Any]:
    """CLoVE's file, or the zoo's where the authors released none."""
    found = RELEASED[FILES[name]] if name in FILES else ZOO["zoo"][TASKS[name].zoo]
    return ZOO["defaults"] | found  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_differs_from_what_was_released_where_it_is_explained_and_nowhere_else(name: str) -> None:
    found, expected = ours(TASKS[name]), released(name)
    assert found.keys() == expected.keys()
    differing = {key: value for key, value in found.items() if value != expected[key]}
    assert differing == {key: value for key, (value, _) in EXPLAINED[name].items()}


def test_pixpros_clove_and_slotcons_files_are_one() -> None:
    """So that it does not matter whose are compared."""
    for one, others in {
        "CLoVE/COCO_R_50_C4_1x_PixPro": ["PixPro/COCO_R_50_C4_1x_PixPro"],
        "CLoVE/COCO_R_50_FPN_1x_PixPro": ["PixPro/COCO_R_50_FPN_1x_PixPro", "SlotCon/COCO_R_50_FPN_1x_SlotCon"],
        "CLoVE/Pascal_VOC_R_50_C4_24k_PixPro": ["PixPro/Pascal_VOC_R_50_C4_24k_PixPro"],
    }.items():
        assert all(RELEASED[other] == RELEASED[one] for other in others)


@pytest.mark.skipif(find_spec("detectron2") is None, reason="Detectron2 is not installed; its recorded files are read")
@pytest.mark.parametrize("name", TASKS)
def test_detectron2_resolves_a_task_to_the_same_config(name: str) -> None:
    from clove_hub.export.detectron2.config import empty_config, resolve

    task = TASKS[name]
    if task.densepose:
        pytest.importorskip("densepose", reason="Detectron2's DensePose project is not installed")
    backbone = Weights("made", "a made backbone", "file", "resnet50", dict(trained("resnet50").state_dict()))
    defaults = plain(empty_config(task.densepose))
    found = plain(resolve(task, backbone, WEIGHTS, 8, []).cfg)
    expected = {key: value for key, value in ours(task).items() if key in defaults}
    assert {key: value for key, value in found.items() if key not in expected} == {
        key: value for key, value in defaults.items() if key not in expected
    }
    assert {key: found[key] for key in expected} == expected
