"""Images with boxes, masks or keypoints, whichever the format is."""

from __future__ import annotations

from pathlib import Path

from . import coco, voc


def read_splits(
    folder: Path, task: coco.Task, train: str = "train", test: str = "val"
) -> tuple[coco.CocoSplit, coco.CocoSplit]:
    """The split that is trained on and the one that is scored, with the same categories.

    Args:
        train: name of a split; folders of VOC's XML have the usual two alone.
        test: the same.

    Raises:
        ValueError: the folder has none of the layouts, or something is wrong in it; the message names what.
    """
    if voc.has_boxes(folder):
        return voc.read_boxes(folder, task)
    learned, scored = (coco.read_split(folder, split, task) for split in (train, test))
    return learned, coco.aligned(learned, scored)
