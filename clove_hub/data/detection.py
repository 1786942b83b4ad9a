"""Images with boxes, masks or keypoints, whichever the format is."""

from __future__ import annotations

from pathlib import Path

from . import coco, voc


def read_splits(folder: Path, task: coco.Task) -> tuple[coco.CocoSplit, coco.CocoSplit]:
    """The training and the validation split, with the same categories.

    Raises:
        ValueError: the folder has none of the layouts, or something is wrong in it; the message names what.
    """
    if voc.has_boxes(folder):
        return voc.read_boxes(folder, task)
    train, val = (coco.read_split(folder, split, task) for split in ("train", "val"))
    return train, coco.aligned(train, val)
