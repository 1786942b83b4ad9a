"""Data sets in COCO's format, checked before anything runs.

    FOLDER/annotations/instances_{train,val}.json          or COCO's own instances_{train,val}2017.json
    FOLDER/annotations/person_keypoints_{train,val}.json   or ...2017.json
    FOLDER/{train,val}/*.jpg                               or {train,val}2017/

What cannot be trained on is left out as Detectron2 leaves it out, with a warning that counts and names it; what is
contradictory is an error that names the file and the annotation.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from clove_hub.runs import sha256

log = logging.getLogger(__name__)

Task = Literal["detection", "instances", "keypoints"]
"""What is learned from the annotations: boxes; boxes and masks; boxes and keypoints."""

KEYPOINTS = 17  # for which the evaluation knows how exactly people place each (COCO's sigmas)


@dataclass(frozen=True)
class Category:
    id: int
    name: str
    keypoints: tuple[str, ...] = ()
    skeleton: tuple[tuple[int, int], ...] = ()
    """Pairs of keypoints that a line joins, numbered from 0."""


@dataclass(frozen=True)
class Photo:
    """An image and its N instances that can be trained on: no crowds, no empty boxes."""

    id: int
    path: Path
    height: int
    width: int
    boxes: NDArray[np.float32]  # (N, 4): x0, y0, x1, y1 in pixels, inside the image
    labels: NDArray[np.int64]  # (N,): place of the category in CocoSplit.categories, from 1; 0 is the background
    segmentations: tuple[Any, ...] = ()  # for masks: each polygons, as a list of arrays x0, y0, x1, ..., or COCO's RLE
    keypoints: NDArray[np.float32] | None = None  # (N, K, 3): x, y in pixels, and 0 absent, 1 hidden, 2 visible


@dataclass(frozen=True)
class CocoSplit:
    path: Path
    """The annotation file."""
    photos: tuple[Photo, ...]
    """All images of the file, those without instances too, in the order of their ids."""
    categories: tuple[Category, ...]
    """In the order of their ids."""
    fingerprint: str
    """sha256 of the annotation file."""


def read_split(folder: Path, split: str, task: Task) -> CocoSplit:
    """Reads and checks one split, `train` or `val`.

    Raises:
        ValueError: a file or image is absent, or an annotation contradicts the format.
    """
    stem = "person_keypoints" if task == "keypoints" else "instances"
    path = _first(folder, [f"annotations/{stem}_{split}{year}.json" for year in ("", "2017")])
    images = _first(folder, [split, f"{split}2017"])
    rows, annotations, categories = _sections(path)
    classes = _categories(categories, path, task)
    labels = {category.id: number for number, category in enumerate(classes, start=1)}
    sizes = _images(rows, path)
    _require_files([row["file_name"] for row in rows], images, path)

    dropped = Dropped()
    usable: dict[int, list[_Instance]] = {image: [] for image in sizes}
    seen: Counter[int] = Counter()
    for annotation in annotations:
        where = _where(annotation, path)
        image, category = annotation.get("image_id"), annotation.get("category_id")
        if image not in sizes:
            raise ValueError(f"{where} belongs to image {image!r}, which the file's images do not list")
        if category not in labels:
            raise ValueError(f"{where} is of category {category!r}, which the file's categories do not list")
        seen[category] += 1
        instance = _instance(annotation, where, sizes[image], labels[category], classes[0], task, dropped)
        if instance is not None:
            usable[image].append(instance)
    if not annotations:
        raise ValueError(f"{path} has no annotations: there is nothing to learn or to score")
    dropped.warn(path)
    if absent := [category.name for category in classes if not seen[category.id]]:
        log.warning(
            "%s: %d of %d categories have no annotation and cannot be %s: %s",
            *(path, len(absent), len(classes), "learned" if split == "train" else "scored", _some(absent)),
        )
    photos = tuple(
        _photo(row, images, usable[row["id"]], task, len(classes[0].keypoints))
        for row in sorted(rows, key=lambda row: row["id"])
    )
    return CocoSplit(path, photos, classes, sha256(path))


def trainable(split: CocoSplit, task: Task) -> list[Photo]:
    """The photos with something to learn: an instance, and for keypoints a labeled one."""

    def worth(photo: Photo) -> bool:
        return bool((photo.keypoints[..., 2] > 0).any()) if photo.keypoints is not None else len(photo.boxes) > 0

    photos = [photo for photo in split.photos if worth(photo)]
    what = "labeled keypoint" if task == "keypoints" else "instance"
    if not photos:
        raise ValueError(f"{split.path}: no image has a usable {what}, so there is nothing to train on")
    if len(photos) < len(split.photos):
        log.warning(
            "%s: %d of %d images have no usable %s and are left out of training",
            *(split.path, len(split.photos) - len(photos), len(split.photos), what),
        )
    return photos


def ground_truth(path: Path) -> dict[str, Any]:
    """The file as pycocotools wants it: what it insists on and the format lets people forget is filled in."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    document.setdefault("info", {})
    for annotation in document["annotations"]:
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", float(annotation["bbox"][2] * annotation["bbox"][3]))
        if "keypoints" in annotation:
            annotation.setdefault("num_keypoints", sum(visible > 0 for visible in annotation["keypoints"][2::3]))
    return document


# ---- pieces ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Instance:
    box: tuple[float, float, float, float]
    label: int
    segmentation: Any = None
    keypoints: NDArray[np.float32] | None = None


@dataclass
class Dropped:
    """What was left out and why, for one warning a reason."""

    reasons: dict[str, list[Any]] = field(default_factory=dict)

    def note(self, reason: str, annotation: Any) -> None:
        self.reasons.setdefault(reason, []).append(annotation)

    def warn(self, path: Path) -> None:
        for reason, ids in self.reasons.items():
            log.warning("%s: %d annotations %s (ids %s)", path, len(ids), reason, _some(ids))


def _first(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise ValueError(
        f"{folder} has neither {' nor '.join(names)}: expected a folder in COCO's format, with annotations/*.json and "
        "the images of each split in a folder of its name"
    )


def _sections(path: Path) -> tuple[list[Any], list[Any], list[Any]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from error
    sections = [document.get(key) if isinstance(document, dict) else None for key in _SECTIONS]
    for key, section in zip(_SECTIONS, sections, strict=True):
        if not isinstance(section, list) or not all(isinstance(row, dict) for row in section):
            raise ValueError(f"{path} has no list of {key}: expected COCO's format, with {', '.join(_SECTIONS)}")
    return sections[0], sections[1], sections[2]  # type: ignore[return-value]


_SECTIONS = ("images", "annotations", "categories")


def _categories(rows: Sequence[Mapping[str, Any]], path: Path, task: Task) -> tuple[Category, ...]:
    classes = []
    for row in sorted(rows, key=lambda row: row.get("id", 0)):
        if not isinstance(row.get("id"), int) or not isinstance(row.get("name"), str):
            raise ValueError(f"{path}: the category {dict(row)} lacks a whole id or a name")
        skeleton = tuple((a - 1, b - 1) for a, b in row.get("skeleton", ()))
        classes.append(Category(row["id"], row["name"], tuple(row.get("keypoints", ())), skeleton))
    if len({category.id for category in classes}) != len(classes) or not classes:
        raise ValueError(f"{path}: {'two categories share an id' if classes else 'it has no categories'}")
    if task == "keypoints":
        if len(classes) != 1 or not classes[0].keypoints:
            raise ValueError(
                f"{path}: its categories are {', '.join(c.name for c in classes)}; keypoints need exactly one, with "
                "the names of its `keypoints`"
            )
        if len(classes[0].keypoints) != KEYPOINTS:
            raise ValueError(
                f"{path}: {classes[0].name} has {len(classes[0].keypoints)} keypoints, but the evaluation knows only "
                f"how exactly COCO's {KEYPOINTS} can be placed"
            )
    return tuple(classes)


def _images(rows: Sequence[Mapping[str, Any]], path: Path) -> dict[int, tuple[int, int]]:
    """Height and width by id."""
    sizes: dict[int, tuple[int, int]] = {}
    for row in rows:
        identity, name = row.get("id"), row.get("file_name")
        size = (row.get("height"), row.get("width"))
        if not isinstance(identity, int) or not isinstance(name, str):
            raise ValueError(f"{path}: the image {dict(row)} lacks a whole id or a file_name")
        if not all(isinstance(side, int) and side > 0 for side in size):
            raise ValueError(f"{path}: image {identity} ({name}) has height {size[0]!r} and width {size[1]!r}")
        if identity in sizes:
            raise ValueError(f"{path}: two images have the id {identity}")
        sizes[identity] = size  # type: ignore[assignment]
    return sizes


def _require_files(names: Sequence[str], folder: Path, path: Path) -> None:
    present = set(os.listdir(folder))
    absent = [name for name in names if name not in present and not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder} lacks {len(absent)} of the {len(names)} images that {path} lists: {_some(absent)}")


def _where(annotation: Mapping[str, Any], path: Path) -> str:
    if not isinstance(annotation.get("id"), int):
        raise ValueError(f"{path}: an annotation of image {annotation.get('image_id')!r} has no whole id")
    return f"{path}: annotation {annotation['id']}"


def _instance(
    annotation: Mapping[str, Any],
    where: str,
    size: tuple[int, int],
    label: int,
    category: Category,
    task: Task,
    dropped: Dropped,
) -> _Instance | None:
    """What can be learned from an annotation; None if nothing."""
    height, width = size
    box = annotation.get("bbox")
    if not _numbers(box) or len(box) != 4:  # type: ignore[arg-type]
        raise ValueError(f"{where} has the bbox {box!r}; expected [x, y, width, height] in pixels")
    x, y, w, h = map(float, box)  # type: ignore[arg-type]
    if annotation.get("iscrowd", 0):
        return None  # not one thing to learn; the evaluation forgives what is found there
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if w <= 0 or h <= 0 or x1 <= x0 or y1 <= y0:
        dropped.note("have a box without size inside the image and are left out", annotation["id"])
        return None
    segmentation = keypoints = None
    if task == "instances":
        segmentation = _segmentation(annotation, where, size, dropped)
        if segmentation is None:
            return None
    if task == "keypoints":
        keypoints = _keypoints(annotation, where, len(category.keypoints))
    return _Instance((x0, y0, x1, y1), label, segmentation, keypoints)


def _segmentation(annotation: Mapping[str, Any], where: str, size: tuple[int, int], dropped: Dropped) -> Any:
    """Polygons as arrays, or RLE as it is; None if no polygon has three corners."""
    found = annotation.get("segmentation")
    if isinstance(found, dict):
        if list(found.get("size", ())) != list(size) or not isinstance(found.get("counts"), list | str):
            raise ValueError(
                f"{where} has a mask in RLE of size {found.get('size')!r}; expected that of its image, "
                f"{list(size)}, and `counts`"
            )
        return found
    if not isinstance(found, list) or not all(_numbers(polygon) for polygon in found):
        raise ValueError(
            f"{where} has the segmentation {str(found)[:60]!r}; instances need polygons ([[x0, y0, x1, y1, ...], ...]) "
            "or RLE. For boxes alone choose the task detection"
        )
    whole = [np.asarray(polygon, dtype=np.float32) for polygon in found if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if not whole:
        dropped.note("have no polygon with three corners or more and are left out", annotation["id"])
        return None
    if len(whole) < len(found):
        dropped.note("lose a polygon with fewer than three corners or half a corner", annotation["id"])
    return whole


def _keypoints(annotation: Mapping[str, Any], where: str, count: int) -> NDArray[np.float32]:
    found = annotation.get("keypoints")
    if not _numbers(found) or len(found) != 3 * count:  # type: ignore[arg-type]
        said = "no keypoints" if found is None else f"keypoints that are not 3 x {count} numbers"
        raise ValueError(f"{where} has {said}; expected x, y and visibility of each")
    return np.asarray(found, dtype=np.float32).reshape(count, 3)


def _photo(row: Mapping[str, Any], folder: Path, instances: Sequence[_Instance], task: Task, keypoints: int) -> Photo:
    points = [instance.keypoints for instance in instances if instance.keypoints is not None]
    return Photo(
        id=row["id"],
        path=folder / row["file_name"],
        height=row["height"],
        width=row["width"],
        boxes=np.array([instance.box for instance in instances], dtype=np.float32).reshape(-1, 4),
        labels=np.array([instance.label for instance in instances], dtype=np.int64),
        segmentations=tuple(i.segmentation for i in instances) if task == "instances" else (),
        keypoints=np.array(points, dtype=np.float32).reshape(-1, keypoints, 3) if task == "keypoints" else None,
    )


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )


def _some(values: Sequence[Any]) -> str:
    """The first few, and that there are more."""
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
