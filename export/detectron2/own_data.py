"""Your own labeled photos as data sets of Detectron2, and the names of their classes beside a model.

They are read by `clove_hub.data.voc.read_splits`: COCO's format, Roboflow's layout, VOC's XML, with its repairs. They
are written in plain COCO format, each image by its absolute path, and registered under the file's path as name: a
config states where its data are.

    OUT/data/train.json, OUT/data/val.json     what Detectron2 reads
    OUT/data/classes.json                      class names, in the order of their numbers; also beside each model
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clove_hub.check import check, require_good, with_boxes
from clove_hub.data.coco import CocoSplit, Photo, Task, compressed, trainable
from clove_hub.data.voc import read_splits
from clove_hub.documents import read_json
from clove_hub.evaluation.result import write_text

from ..seeds import Found

CLASSES = "classes.json"


@dataclass(frozen=True)
class OwnData:
    """A folder of labeled photos, read and checked."""

    train: tuple[Photo, ...]
    """The photos with annotations to train on."""
    splits: tuple[CocoSplit, CocoSplit]
    """The training split and the test split."""
    found: Found

    @property
    def classes(self) -> list[str]:
        return [category.name for category in self.splits[0].categories]

    @property
    def runs(self) -> bool:
        """Whether a mask is in COCO's RLE, which Detectron2 reads only as bitmasks."""
        return any(isinstance(one, dict) for photo in self.train for one in photo.segmentations)


def read(folder: Path, task: Task) -> OwnData:
    """Read a folder, and decode every image once.

    Args:
        task: `detection` or `instances`.

    Raises:
        ValueError: it has none of the layouts or has a fault; an image cannot be read, or its size differs from that in
            its annotations.
    """
    train, val = splits = read_splits(folder, task)
    photos = tuple(trainable(train, task))
    every = with_boxes([*photos, *val.photos])
    require_good(list(check(every, range(len(every.paths)), 0)), folder, task)
    fingerprint = hashlib.sha256(f"{train.fingerprint}{val.fingerprint}".encode()).hexdigest()
    return OwnData(photos, splits, Found(len(photos), len(val.photos), fingerprint))


def write(data: OwnData, folder: Path) -> tuple[Path, Path]:
    """Write both splits and the class names to a folder.

    Returns:
        The files of the training split and the test split.
    """
    train, val = data.splits
    ids = [category.id for category in train.categories]
    categories = [{"id": category.id, "name": category.name} for category in train.categories]
    rows = [row for photo in data.train for row in _annotations(photo, ids)]
    learned = {
        "images": [_image(photo) for photo in data.train],
        "annotations": [{"id": number} | row for number, row in enumerate(rows, start=1)],
        "categories": categories,
    }
    scored = val.truth | {"images": [_image(photo) for photo in val.photos], "categories": categories}
    files = (folder / "train.json", folder / "val.json")
    for file, document in zip(files, (learned, scored), strict=True):
        write_text(file, json.dumps({"info": {}} | document, ensure_ascii=False) + "\n")
    write_classes(folder, data.classes)
    return files


def write_classes(folder: Path, names: Sequence[str]) -> None:
    write_text(folder / CLASSES, json.dumps(list(names), ensure_ascii=False, indent=1) + "\n")


def register(cfg: Any) -> list[str]:
    """Register the data sets that a config names by their files, with the names of their classes.

    If the data are not available, as for a model on another machine, the names are read from `classes.json` in the
    config's OUTPUT_DIR; they are enough to draw detections.

    Args:
        cfg: Detectron2's config, before or after it is frozen.

    Returns:
        The classes' names, in the order of their numbers; empty for other data sets.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    found: list[str] = []
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if not name.endswith(".json"):
            continue
        if name not in DatasetCatalog.list() and Path(name).is_file():
            register_coco_instances(name, {}, name, "")
        places = (Path(name).with_name(CLASSES), Path(cfg.OUTPUT_DIR, CLASSES))
        if place := next((place for place in places if place.is_file()), None):
            found = [str(one) for one in read_json(place)]
            MetadataCatalog.get(name).set(thing_classes=found)
    return found


# ---- pieces ----------------------------------------------------------------------------------------------------------


def _image(photo: Photo) -> dict[str, Any]:
    return {"id": photo.id, "file_name": str(photo.path.resolve()), "height": photo.height, "width": photo.width}


def _annotations(photo: Photo, ids: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for number, (box, label) in enumerate(zip(photo.boxes.astype(np.float64), photo.labels, strict=True)):
        x0, y0, x1, y1 = box.round(3).tolist()
        row = {
            "image_id": photo.id,
            "category_id": ids[label - 1],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": 0,
        }
        if photo.segmentations:
            row["segmentation"] = _segmentation(photo.segmentations[number], photo)
        rows.append(row)
    return rows


def _segmentation(mask: Any, photo: Photo) -> Any:
    if isinstance(mask, list):
        return [np.asarray(polygon, dtype=np.float64).round(3).tolist() for polygon in mask]
    rle = compressed(mask, photo.height, photo.width)
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
