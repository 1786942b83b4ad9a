"""Data sets in COCO's format, checked before anything runs.

What cannot be trained on is left out as in Detectron2, with a warning that counts and names it; a contradiction is an
error that names the file and the annotation. `coco_files` documents where the files may be, and `coco_document` what is
repaired.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from clove_hub.runs import sha256

from .coco_document import Document, Dropped, Row, read_document, read_images, unused_parents, warn
from .coco_files import layout, listed_files
from .files import add_files
from .values import numbers, some, whole

log = logging.getLogger(__name__)

Task = Literal["detection", "instances", "keypoints"]
"""The task: boxes; boxes and masks; boxes and keypoints."""

KEYPOINTS = 17  # the number for which the evaluation has COCO's sigmas, the annotators' precision


@dataclass(frozen=True)
class Category:
    id: int
    name: str
    keypoints: tuple[str, ...] = ()
    skeleton: tuple[tuple[int, int], ...] = ()
    """Pairs of keypoints connected by a line, numbered from 0."""


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
    """The annotation file, or the list or folder of them."""
    photos: tuple[Photo, ...]
    """All images of the file, including those without instances, in the order of their ids."""
    categories: tuple[Category, ...]
    """In the order of their ids."""
    fingerprint: str
    """sha256 of the annotations, and of the names and sizes of the images."""
    truth: dict[str, Any]
    """Ground truth for pycocotools: perfect detections have an AP of 100. Objects that cannot be trained on, without a
    mask or marked as a crowd, count neither as found nor as missed. Empty for a split that is not scored."""
    absent: tuple[str, ...]
    """Names of the categories without an instance."""


def read_split(folder: Path, split: str, task: Task, scored: bool = True) -> CocoSplit:
    """Read and check one split, `train` or `val`.

    Args:
        scored: whether it has ground truth, which is as large as the annotation file.

    Raises:
        ValueError: a file or image is missing, or an annotation contradicts the format.
    """
    path, images = layout(folder, split, "person_keypoints" if task == "keypoints" else "instances")
    document = read_document(path)
    files = listed_files([row["file_name"] for row in document.images], images, path)
    digest = hashlib.sha256(sha256(path).encode())
    add_files(digest, images, files)
    return split_of(document, files, path, task, digest.hexdigest(), scored)


def images_of(path: Path, folder: Path) -> list[tuple[int, Path]]:
    """Id and file of each image that an annotation file lists.

    Args:
        folder: the images' folder, at any depth.

    Raises:
        ValueError: the file is not in COCO's format, or lists an image that is not in the folder.
    """
    rows, _ = read_images(path)
    files = listed_files([row["file_name"] for row in rows], folder, path)
    return [(row["id"], file) for row, file in zip(rows, files, strict=True)]


def split_of(
    document: Document, files: Sequence[Path], path: Path, task: Task, fingerprint: str, scored: bool
) -> CocoSplit:
    """A split from repaired annotations.

    Args:
        files: the files of the document's images, in their order.
        path: the annotation file, for messages.
        scored: whether it has ground truth.

    Raises:
        ValueError: an annotation lacks what the task needs.
    """
    parents = unused_parents(document)
    if parents:
        names = some([row["name"] for row in document.categories if row["id"] in parents])
        log.info("%s: the category %s is only a parent of others and is left out", path, names)
    classes = _categories([row for row in document.categories if row["id"] not in parents], path, task)
    labels = {category.id: number for number, category in enumerate(classes, start=1)}
    sizes = {row["id"]: (row["height"], row["width"]) for row in document.images}
    usable: dict[int, list[tuple[Row, Any, NDArray[np.float32] | None]]] = {image: [] for image in sizes}
    truth: list[Row] = []
    seen: Counter[int] = Counter()
    dropped: Dropped = defaultdict(list)
    count = len(classes[0].keypoints)
    if task == "instances":
        _refuse_other_masks(document.annotations, path)
    for row in document.annotations:
        if row["bbox"] is None:
            continue
        found = None if row["iscrowd"] else _learned(row, path, sizes[row["image_id"]], count, task, dropped)
        if found is not None:
            usable[row["image_id"]].append((row, *found))
            seen[row["category_id"]] += 1
        if scored:
            truth.append(_truth(row, found is None, task, count))
    warn(dropped, path)
    if scored and not seen:
        raise ValueError(f"{path}: no annotation can be used (see the warnings), so there is nothing to score")
    if absent := tuple(category.name for category in classes if not seen[category.id]):
        log.warning(
            "%s: %d of %d categories have no annotation and cannot be %s: %s",
            *(path, len(absent), len(classes), "scored" if scored else "learned", some(absent)),
        )
    photos = []
    for row, file in zip(document.images, files, strict=True):
        own, masks, points = zip(*usable[row["id"]], strict=True) if usable[row["id"]] else ((), (), ())
        boxes = np.array([instance["bbox"] for instance in own], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        photo = Photo(
            id=row["id"],
            path=file,
            height=row["height"],
            width=row["width"],
            boxes=boxes.astype(np.float32),
            labels=np.array([labels[instance["category_id"]] for instance in own], dtype=np.int64),
            segmentations=masks if task == "instances" else (),
            keypoints=np.array(points, dtype=np.float32).reshape(-1, count, 3) if task == "keypoints" else None,
        )
        photos.append(photo)
    kept = {
        "info": {},
        "images": [{key: row[key] for key in ("id", "height", "width", "file_name")} for row in document.images],
        "categories": [{"id": category.id, "name": category.name} for category in classes],
        "annotations": truth,
    }
    ordered = tuple(sorted(photos, key=lambda photo: photo.id))
    return CocoSplit(path, ordered, classes, fingerprint, kept if scored else {}, absent)


def trainable(split: CocoSplit, task: Task) -> list[Photo]:
    """The photos to train on: with an instance, and for keypoints a labeled one."""

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


def aligned(train: CocoSplit, val: CocoSplit) -> CocoSplit:
    """The second split with the first one's categories, matched by name.

    Raises:
        ValueError: it has annotations of a category, or names of keypoints, that the first one lacks.
    """
    if val.categories == train.categories:
        return val
    numbers_of = {category.name: number for number, category in enumerate(train.categories, start=1)}
    points = {category.name: category.keypoints for category in train.categories}
    odd = [c.name for c in val.categories if c.name not in points and c.name not in val.absent]
    if odd or any(points.get(c.name, c.keypoints) != c.keypoints for c in val.categories):
        only = f"{some(odd)} only in the second" if odd else "other names of keypoints"
        raise ValueError(
            f"{train.path} and {val.path} have different categories ({only}): both must belong to the same data set"
        )
    log.info(
        "%s: its categories have another order or other ids than those of %s; they are matched by name",
        val.path,
        train.path,
    )
    table = np.array([0, *(numbers_of.get(category.name, 0) for category in val.categories)], dtype=np.int64)
    ids = {c.id: train.categories[numbers_of[c.name] - 1].id for c in val.categories if c.name in numbers_of}
    rows = [
        row | {"category_id": ids[row["category_id"]]} for row in val.truth["annotations"] if row["category_id"] in ids
    ]
    truth = val.truth | {"categories": [{"id": c.id, "name": c.name} for c in train.categories], "annotations": rows}
    return replace(
        val,
        photos=tuple(replace(photo, labels=table[photo.labels]) for photo in val.photos),
        categories=train.categories,
        truth=truth,
        absent=tuple(c.name for c in train.categories if c.name in val.absent or c.id not in ids.values()),
    )


# ---- pieces ----------------------------------------------------------------------------------------------------------


def _categories(rows: Sequence[Row], path: Path, task: Task) -> tuple[Category, ...]:
    classes: list[Category] = []
    for row in rows:
        if twice := [other.id for other in classes if other.name == row["name"]]:
            raise ValueError(
                f"{path}: the categories {twice[0]} and {row['id']} are both named {row['name']!r}: merge them, or "
                "remove the one that no annotation uses"
            )
        points = row.get("keypoints")
        named = tuple(map(str, points)) if isinstance(points, list) else ()
        classes.append(Category(row["id"], row["name"], named, _skeleton(row.get("skeleton"), len(named))))
    if task == "keypoints":
        if len(classes) != 1 or not classes[0].keypoints:
            raise ValueError(
                f"{path}: its categories are {', '.join(c.name for c in classes)}; keypoints need exactly one, with "
                "the names of its `keypoints`"
            )
        if len(classes[0].keypoints) != KEYPOINTS:
            raise ValueError(
                f"{path}: {classes[0].name} has {len(classes[0].keypoints)} keypoints, but the evaluation has tolerances "
                f"only for COCO's {KEYPOINTS}"
            )
    return tuple(classes)


def _skeleton(lines: Any, count: int) -> tuple[tuple[int, int], ...]:
    """The lines between two existing keypoints; they are used only for drawing."""
    pairs = [[whole(end) for end in line] for line in lines or () if isinstance(line, list) and len(line) == 2]
    return tuple(
        (a - 1, b - 1) for a, b in pairs if a is not None and b is not None and 1 <= min(a, b) <= max(a, b) <= count
    )


def _learned(
    row: Row, path: Path, size: tuple[int, int], count: int, task: Task, dropped: Dropped
) -> tuple[Any, NDArray[np.float32] | None] | None:
    """The mask and the keypoints of an annotation for the task; None if it is left out."""
    where = f"{path}: annotation {row['name']}"
    segmentation = keypoints = None
    if task == "instances":
        segmentation = row["segmentation"]
        if not _is_mask(segmentation):
            raise ValueError(
                f"{where} has the segmentation {str(segmentation)[:60]!r}; instances need polygons "
                "([[x0, y0, x1, y1, ...], ...]) or RLE. For boxes alone choose the task detection"
            )
        if not segmentation:
            dropped["have no polygon with three corners or more and are left out"].append(row["name"])
            return None
        if _is_empty(segmentation, *size):
            dropped["have a mask without any pixel inside the image and are left out"].append(row["name"])
            return None
        if isinstance(segmentation, list):
            segmentation = [np.asarray(polygon, dtype=np.float32) for polygon in segmentation]
    if task == "keypoints":
        found = row.get("keypoints")
        if found is None or len(found) != 3 * count:
            said = "no keypoints" if found is None else f"keypoints that are not 3 x {count} numbers"
            raise ValueError(f"{where} has {said}; expected x, y and visibility of each")
        keypoints = np.asarray(found, dtype=np.float32).reshape(count, 3)
    return segmentation, keypoints


def _is_mask(segmentation: Any) -> bool:
    """Whether it is RLE or a list of polygons, which may be empty."""
    return isinstance(segmentation, dict) or (
        isinstance(segmentation, list) and all(numbers(polygon) is not None for polygon in segmentation)
    )


def _is_empty(segmentation: Any, height: int, width: int) -> bool:
    """Whether it contains no pixel of the image."""
    if isinstance(segmentation, list):
        xs, ys = (np.concatenate([polygon[start::2] for polygon in segmentation]) for start in (0, 1))
        if min(xs) >= 0 and min(ys) >= 0 and max(xs) <= width and max(ys) <= height and np.ptp(xs) > 2 < np.ptp(ys):
            return False  # only thin ones need to be drawn
    from pycocotools import mask

    return not mask.area(compressed(segmentation, height, width))


def compressed(segmentation: Any, height: int, width: int) -> Row:
    """Polygons or RLE as pycocotools' compressed RLE."""
    from pycocotools import mask

    encode = isinstance(segmentation, list) or isinstance(segmentation["counts"], list)
    rle = mask.frPyObjects(segmentation, height, width) if encode else segmentation
    merged: Row = mask.merge(rle) if isinstance(rle, list) else rle
    return merged


def _refuse_other_masks(rows: Sequence[Row], path: Path) -> None:
    """Raise ValueError if polygons do not match their boxes: in other pixels, or in fractions of the image."""
    counted = apart = 0
    for row in rows:
        shape = row["segmentation"]
        if row["bbox"] is None or not shape or isinstance(shape, dict) or not _is_mask(shape):
            continue
        corners = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in shape])
        start, size = np.reshape(row["bbox"], (2, 2))
        common = (np.minimum(corners.max(0), start + size) - np.maximum(corners.min(0), start)).clip(0).prod()
        counted += 1
        apart += bool(common < 0.5 * max(np.ptp(corners, 0).prod(), size.prod()))
    if apart * 4 > counted:
        raise ValueError(
            f"{path}: {apart} of {counted} polygons do not fit their boxes: both must be in pixels of the same image. "
            "Export them together"
        )


def _truth(row: Row, forgiven: bool, task: Task, count: int) -> Row:
    """An annotation for pycocotools; with `forgiven` it counts neither as found nor as missed."""
    keys = ("id", "image_id", "category_id", "bbox", "area")
    kept = {key: row[key] for key in keys} | {"iscrowd": int(forgiven)}
    x, y, w, h = row["bbox"]
    if task == "instances":
        mask = row["segmentation"] if _is_mask(row["segmentation"]) else None
        kept["segmentation"] = mask or [[x, y, x + w, y, x + w, y + h, x, y + h]]
    if task == "keypoints":
        points = row.get("keypoints")
        whole_ones = points is not None and len(points) == 3 * count
        kept["keypoints"] = points if whole_ones else [0.0] * (3 * count)
        kept["num_keypoints"] = row["num_keypoints"] if whole_ones else 0
    return kept
