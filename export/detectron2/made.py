"""Score the ground truth, in the form of a detector's predictions, with a task's own evaluator.

The rehearsal runs it on a few images:

    python -m clove_hub.export.detectron2.made OUT/rehearsal/first.yaml OUT/rehearsal/made.json
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances, polygons_to_bitmask
from torch import Tensor

from .repairs import mend
from .train_net import read_config, trainer_kind

SIZE = 56
"""Side of DensePose's maps of an object, in pixels."""


def main(config: Path, out: Path) -> None:
    cfg, densepose = read_config(config)
    name = cfg.DATASETS.TEST[0]
    mend(MetadataCatalog.get(name).get("evaluator_type"), densepose)
    kind = trainer_kind(densepose)
    kind.build_test_loader(cfg, name)  # it completes the metadata of DensePose's data
    evaluator = kind.build_evaluator(cfg, name)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        evaluator.process([record], [{"instances": perfect(record, cfg, densepose)}])
    figures: Mapping[str, Mapping[str, float]] = evaluator.evaluate() or {}
    scores = {
        group: {key: float(value) if math.isfinite(value) else None for key, value in own.items()}
        for group, own in figures.items()
    }
    out.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


def perfect(record: Mapping[str, Any], cfg: Any, densepose: bool) -> Instances:
    """The output of a perfect detector for an image.

    Args:
        record: the image's record, in Detectron2's format.
    """
    there = [row for row in record["annotations"] if not row.get("iscrowd")]
    if densepose:
        there = [row for row in there if "dp_x" in row]
    elif cfg.MODEL.KEYPOINT_ON:  # without labeled keypoints a person cannot be matched
        there = [row for row in there if any(row["keypoints"][2::3])]
    found = Instances((record["height"], record["width"]))
    boxes = [BoxMode.convert(row["bbox"], row["bbox_mode"], BoxMode.XYXY_ABS) for row in there]
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.scores = torch.linspace(0.99, 0.9, len(there))
    found.pred_classes = torch.tensor([0 if densepose else row["category_id"] for row in there], dtype=torch.int64)
    if densepose:
        found.pred_densepose = _surface(there)
    elif cfg.MODEL.MASK_ON:
        masks = [_mask(row["segmentation"], record["height"], record["width"]) for row in there]
        found.pred_masks = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, 1, 1, dtype=torch.bool)
    if cfg.MODEL.KEYPOINT_ON:
        points = [np.reshape(row["keypoints"], (-1, 3)) for row in there]
        found.pred_keypoints = (
            torch.from_numpy(np.stack(points).astype(np.float32)) if points else torch.zeros(0, 17, 3)
        )
    return found


def _mask(segmentation: Any, height: int, width: int) -> Any:
    if isinstance(segmentation, list):
        return polygons_to_bitmask([np.asarray(part, float) for part in segmentation], height, width)
    from pycocotools import mask

    return mask.decode(segmentation).astype(bool)


def _surface(there: Sequence[Mapping[str, Any]]) -> Any:
    """For each person the part with the most points, at their center, over the whole box.

    Returns:
        DensePose's output: maps (people, channels, SIZE, SIZE) of the coarse segmentation, parts, u and v.
    """
    from densepose.structures import DensePoseChartPredictorOutput

    def maps(channels: int) -> Tensor:
        return torch.zeros(len(there), channels, SIZE, SIZE)

    coarse, parts, u, v = maps(2), maps(25), maps(25), maps(25)
    coarse[:, 1] = 1
    for number, row in enumerate(there):
        part = int(Counter(row["dp_I"]).most_common(1)[0][0])
        own = [place for place, each in enumerate(row["dp_I"]) if int(each) == part]
        parts[number, part] = 1
        u[number, part] = float(np.median(np.asarray(row["dp_U"])[own]))
        v[number, part] = float(np.median(np.asarray(row["dp_V"])[own]))
    return DensePoseChartPredictorOutput(coarse_segm=coarse, fine_segm=parts, u=u, v=v)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
