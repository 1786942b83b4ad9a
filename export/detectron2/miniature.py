"""A few images of a data set, in its own layout, on which a rehearsal is trained and scored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from clove_hub.documents import read_json

from .layouts import LISTED, VOC_SPLITS, image_path

TRAIN = 4
"""Images of each training split."""
TEST = 2


def write_miniature(layout: str, root: Path, target: Path) -> Path:
    """Write the miniature data set; the images are links. Return an image of the test split.

    Args:
        layout: one of `layouts.LAYOUTS`.
        root: Detectron2's DETECTRON2_DATASETS, with the complete data set.

    Raises:
        ValueError: no image of a split has an object.
    """
    root = root.resolve()
    if layout in ("voc", "cityscapes"):
        return {"voc": _voc, "cityscapes": _cityscapes}[layout](root, target)
    splits = LISTED[layout]
    for number, (file, images) in enumerate(splits, start=1):
        document = fewer(root / file, TEST if number == len(splits) else TRAIN, layout)
        _write(target / file, json.dumps(document))
        _link(target / images, root / images)
    return image_path(document["images"][0], target / images)


def fewer(path: Path, count: int, layout: str) -> dict[str, Any]:
    """A file in COCO's format, reduced to its first images with objects that are scored."""
    document: dict[str, Any] = read_json(path)
    shown = {row["image_id"] for row in document["annotations"] if _counts(row, layout)}
    if not shown:
        raise ValueError(f"{path} has no annotation that {layout} could be scored on")
    images = list(islice((row for row in document["images"] if row["id"] in shown), count))
    kept = {row["id"] for row in images}
    return document | {
        "images": images,
        "annotations": [row for row in document["annotations"] if row["image_id"] in kept],
    }


def _counts(annotation: Mapping[str, Any], layout: str) -> bool:
    if annotation.get("iscrowd"):
        return False
    if layout == "coco_keypoints":
        return bool(annotation.get("num_keypoints"))
    return layout != "densepose" or "dp_x" in annotation


def _voc(root: Path, target: Path) -> Path:
    for number, (year, split) in enumerate(VOC_SPLITS, start=1):
        names = (root / year / "ImageSets/Main" / f"{split}.txt").read_text(encoding="utf-8").split()
        chosen = names[: TEST if number == len(VOC_SPLITS) else TRAIN]
        _write(target / year / "ImageSets/Main" / f"{split}.txt", "\n".join(chosen) + "\n")
        for folder in ("Annotations", "JPEGImages"):
            _link(target / year / folder, root / year / folder)
    return target / year / "JPEGImages" / f"{chosen[0]}.jpg"


def _cityscapes(root: Path, target: Path) -> Path:
    for split, count in (("train", TRAIN), ("val", TEST)):
        images = root / "cityscapes/leftImg8bit" / split
        photos = (photo for photo in sorted(images.glob("*/*_leftImg8bit.png")) if _inhabited(root, photo, split))
        for photo in _some(photos, count, images):
            stem = photo.name.removesuffix("leftImg8bit.png")
            files = [f"leftImg8bit/{split}/{photo.parent.name}/{photo.name}"]
            kinds = ("polygons.json", "instanceIds.png", "labelIds.png")
            files += [f"gtFine/{split}/{photo.parent.name}/{stem}gtFine_{kind}" for kind in kinds]
            for file in files:
                _link(target / "cityscapes" / file, root / "cityscapes" / file)
    return target / "cityscapes" / files[0]


def _inhabited(root: Path, photo: Path, split: str) -> bool:
    """Whether a photo of a city contains a person or a car."""
    name = photo.name.replace("leftImg8bit.png", "gtFine_polygons.json")
    truth = read_json(root / "cityscapes/gtFine" / split / photo.parent.name / name)
    return any(row["label"] in ("person", "car") for row in truth["objects"])


def _some(photos: Iterable[Path], count: int, images: Path) -> list[Path]:
    found = list(islice(photos, count))
    if not found:
        raise ValueError(f"no image in {images} shows a person or a car")
    return found


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _link(path: Path, original: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.symlink_to(original)
