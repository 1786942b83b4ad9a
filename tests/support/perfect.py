"""A detector that finds exactly what is there, and its average precision."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import numpy as np

from clove_hub.data.coco import CocoSplit


def results(split: CocoSplit) -> list[dict[str, Any]]:
    """What the split's photos have, each with a score, as COCO's list of results."""
    from pycocotools import mask

    found = []
    for photo in split.photos:
        for number, (box, label) in enumerate(zip(photo.boxes.astype(float), photo.labels, strict=True)):
            row: dict[str, Any] = {
                "image_id": photo.id,
                "category_id": split.categories[label - 1].id,
                "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
                "score": 1 - number / 1000,
            }
            if photo.segmentations:
                shape = photo.segmentations[number]
                if isinstance(shape, list):
                    shape = mask.frPyObjects([part.tolist() for part in shape], photo.height, photo.width)
                elif isinstance(shape["counts"], list):
                    shape = mask.frPyObjects(shape, photo.height, photo.width)
                row["segmentation"] = mask.merge(shape) if isinstance(shape, list) else shape
            if photo.keypoints is not None:
                if not (photo.keypoints[number, :, 2] > 0).any():
                    continue  # who has no labeled keypoint is not there to be found by his keypoints
                row["keypoints"] = photo.keypoints[number].astype(float).ravel().tolist()
            found.append(row)
    return found


def average_precisions(truth: dict[str, Any], found: list[dict[str, Any]], kind: str, library: str) -> np.ndarray:
    """COCOeval's figures (AP, AP50, AP75, ...) by `pycocotools` or `faster_coco_eval`; -1 where there is nothing."""
    if library == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        ground.dataset = copy.deepcopy(truth)
        ground.createIndex()
        rows = [{k: v for k, v in row.items() if kind != "segm" or k != "bbox"} for row in copy.deepcopy(found)]
        evaluation = COCOeval(ground, ground.loadRes(rows), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.asarray(evaluation.stats[:6])
