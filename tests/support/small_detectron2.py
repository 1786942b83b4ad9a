"""Detectron2's tasks so small that they train on the CPU: a few photos, an iteration in a second."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED

from clove_hub.export.detectron2.config import BATCH

SMALL = [
    *(BATCH, "2", "SOLVER.MAX_ITER", "30", "SOLVER.WARMUP_ITERS", "5", "SOLVER.BASE_LR", "0.005"),
    *("SOLVER.CHECKPOINT_PERIOD", "20", "DATALOADER.NUM_WORKERS", "0", "TEST.PRECISE_BN.NUM_ITER", "2"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MAX_SIZE_TRAIN", "96"),
    *("INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "4", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "4", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
]


def photos_of_coco(root: Path) -> Path:
    """Writes a few photos in the layout that Detectron2 expects; skips the test where they are not at hand."""
    source = SHARED / "data" / "detection"
    if not source.is_dir():
        pytest.skip(f"the photos are not at hand ({source})")
    (root / "coco" / "annotations").mkdir(parents=True)
    for split, count in (("train", 8), ("val", 2)):
        document = json.loads((source / "annotations" / f"instances_{split}.json").read_text())
        shown = {annotation["image_id"] for annotation in document["annotations"]}
        document["images"] = [image for image in document["images"] if image["id"] in shown][:count]
        kept = {image["id"] for image in document["images"]}
        document["annotations"] = [a for a in document["annotations"] if a["image_id"] in kept]
        (root / "coco" / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(document))
        (root / "coco" / f"{split}2017").symlink_to(source / split)
    return root


def command(task: str, run: Path, data: Path, out: Path, *more: str) -> dict[str, Any]:
    """The arguments of `subprocess` for a process of its own: Detectron2 reads where its data are once, on import."""
    words = ["detectron2", task, "--backbone", str(run), "--data", str(data), "--out", str(out), "--gpus", "0"]
    return {
        "args": [sys.executable, "-W", "ignore", "-m", "clove_hub.cli", "downstream", *words, "--runs", "1", *more],
        "env": os.environ | {"OMP_NUM_THREADS": "1"},
        "text": True,
    }
