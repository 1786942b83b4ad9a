"""The figures of a folder that `from_pretrained` loads, with its users' loading, pre- and post-processing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from clove_hub.data.coco import CocoSplit
from clove_hub.evaluation.processes import gather, share
from clove_hub.evaluation.result import Items, by_class
from clove_hub.evaluation.scores import absent_classes, class_scores, confusion, segmentation_scores
from clove_hub.weights.transformers import Model

from ..finetune.dataset import Sample, SegmentationDataset
from ..finetune.scores import as_results, average_precision
from ..finetune.splits import TaskData
from ..run.stopping import Stop, until_stopped
from .examples import prepared


@torch.no_grad()
def evaluate(
    folder: Path,
    kind: Model,
    loaded: TaskData,
    device: torch.device,
    asked_to_stop: Stop,
    absent_as_zero: bool = False,
) -> tuple[dict[str, float], Items, tuple[str, ...]]:
    """The metrics of all test images in float32, those of each class, and the classes without an image.

    The images are divided among the processes; all processes get all metrics.

    Args:
        folder: the folder of the model and its image processor.
        absent_as_zero: for segmentation, as in `segmentation_scores`.

    Raises:
        ValueError: a test image or mask cannot be read, or no pixel has a class.
        SystemExit: as `until_stopped`.
    """
    model = getattr(transformers, kind.opened_by).from_pretrained(folder).to(device).eval()
    processors: Any = transformers.AutoImageProcessor
    processor = processors.from_pretrained(folder)
    test, truth = loaded.test, loaded.truth

    def outputs() -> Iterator[tuple[int, Sample, Any]]:
        for index in until_stopped(share(range(len(test))), asked_to_stop):
            sample = test[0, index]
            pixels = prepared(processor, [sample.image])
            yield index, sample, model(**{name: value.to(device) for name, value in pixels.items()})

    if isinstance(test, SegmentationDataset):
        matrix = torch.stack(gather(counts(processor, loaded.classes, *found[1:]) for found in outputs())).sum(0)
        if not int(matrix.sum()):
            raise ValueError("the masks of the test split are all void: there is nothing to score")
        names = test.part.classes
        return (
            segmentation_scores(matrix, absent_as_zero),
            {"class": class_scores(matrix, names)},
            absent_classes(matrix, names),
        )
    assert isinstance(truth, CocoSplit)
    ids = [photo.id for photo in test.photos]
    own = (
        as_results(ids[index], detected(processor, sample, found), truth.categories)
        for index, sample, found in outputs()
    )
    results = [row for rows in gather(own) for row in rows]
    metrics, items = by_class(average_precision(truth.truth, results, ("bbox",), ids))
    return metrics, items, loaded.without_object


def detected(processor: Any, sample: Sample, outputs: Any) -> dict[str, Tensor]:
    """Boxes (N, 4) in pixels of the image, labels (N,) from 1 and scores (N,), without a threshold."""
    size = sample.image.shape[1:]
    (found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[tuple(size)])
    return {"boxes": found["boxes"], "labels": found["labels"] + 1, "scores": found["scores"]}


def counts(processor: Any, classes: int, sample: Sample, outputs: Any) -> Tensor:
    """`confusion` of an image, (K, K)."""
    mask = sample.target["classes"]
    (found,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[tuple(mask.shape)])
    return confusion(found.cpu(), mask, classes)
