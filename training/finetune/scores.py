"""Scores of detections: COCO's average precision by pycocotools, or by faster-coco-eval if it is installed."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from clove_hub.data.coco import Category

from .settings import Task

log = logging.getLogger(__name__)

Kind = Literal["bbox", "segm", "keypoints"]
KINDS: dict[Task, tuple[Kind, ...]] = {
    "detection": ("bbox",),
    "instances": ("bbox", "segm"),
    "keypoints": ("bbox", "keypoints"),
}
SUFFIX: dict[Kind, str] = {"bbox": "bb", "segm": "mk", "keypoints": "kp"}
# The average precisions among COCOeval's twelve (keypoints: ten) figures.
NAMES: dict[Kind, tuple[str, ...]] = {
    "bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),
}


def as_results(
    image: int, found: Mapping[str, Tensor], categories: Sequence[Category], threshold: float = 0.5
) -> list[dict[str, Any]]:
    """The predictions of a torchvision detector for an image, in COCO's results format.

    Args:
        image: the image's id.
        found: boxes (N, 4), labels (N,) from 1, scores (N,), and masks (N, 1, H, W) or keypoints (N, K, 3).
        threshold: threshold of a mask's probability.
    """
    from pycocotools import mask

    boxes = found["boxes"].double().cpu()
    corners = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    scores, labels = found["scores"].tolist(), found["labels"].tolist()
    results: list[dict[str, Any]] = [
        {"image_id": image, "category_id": categories[label - 1].id, "bbox": box, "score": score}
        for box, score, label in zip(corners, scores, labels, strict=True)
    ]
    if "masks" in found:
        inside = (found["masks"][:, 0] >= threshold).cpu().numpy().astype(np.uint8)
        for result, one in zip(results, inside, strict=True):
            rle = mask.encode(np.asfortranarray(one))
            result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
    if "keypoints" in found:
        points = found["keypoints"].double().cpu().clone()
        points[..., :2] -= 0.5  # COCO gives the index of a pixel, not its center
        for result, person in zip(results, points.flatten(1).tolist(), strict=True):
            result["keypoints"] = person
    return results


def package() -> str:
    """The scoring package: `faster-coco-eval`, which gives the same figures faster, or `pycocotools`."""
    return "faster-coco-eval" if find_spec("faster_coco_eval") else "pycocotools"


def evaluator() -> tuple[Any, Any]:
    """COCO and COCOeval of the package."""
    if package() == "faster-coco-eval":
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


def average_precision(
    truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    kinds: Iterable[Kind],
    images: Sequence[int] | None = None,
) -> dict[str, float]:
    """COCO's average precisions in percent: APbb, AP50bb, ..., APmk, ..., APkp.

    Args:
        truth: an annotation file's content (`coco.CocoSplit.truth`).
        results: results of all images, from `as_results`.
        images: ids of the scored images; by default all in the file.

    Returns:
        The defined figures: without small objects there is no APs. `APbb/person` is that of one category.
    """
    COCO, COCOeval = evaluator()
    metrics: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        ground = COCO()
        ground.dataset = copy.deepcopy(dict(truth))  # it modifies it
        ground.createIndex()
        nothing = COCO()  # `loadRes` fails for an empty list
        nothing.dataset = ground.dataset | {"annotations": []}
        nothing.createIndex()
        if not results:
            log.warning("nothing was found in any image: every AP is 0")
        for kind in kinds:
            # With a box, a mask's area would be that of its box; a person's is, as in Detectron2.
            rows = [{k: v for k, v in row.items() if kind != "segm" or k != "bbox"} for row in results]
            evaluation = COCOeval(ground, ground.loadRes(rows) if rows else nothing, kind)
            if images is not None:
                evaluation.params.imgIds = sorted(images)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            values = zip(NAMES[kind], evaluation.stats, strict=False)
            metrics |= {f"{name}{SUFFIX[kind]}": _percent(value) for name, value in values if value >= 0}
            # (thresholds, recalls, categories, areas, limits), -1 where a category has no instance; all areas, most
            # found
            precision = evaluation.eval["precision"][:, :, :, 0, -1]
            for number, category in enumerate(ground.loadCats(evaluation.params.catIds)):
                if (own := precision[:, :, number])[own > -1].size:
                    metrics[f"AP{SUFFIX[kind]}/{category['name']}"] = _percent(own[own > -1].mean())
    return metrics


def _percent(share: float) -> float:
    """Round to nine decimals, to which the packages agree: pycocotools adds 2e-16 to its divisors."""
    return round(100 * float(share), 9)
