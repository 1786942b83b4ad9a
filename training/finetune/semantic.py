"""Data sets with a class for every pixel, in the layout of VOC or in a plain one, checked before anything runs.

    FOLDER/ImageSets/Segmentation/{train,val}.txt, JPEGImages/*.jpg, SegmentationClass/*.png       VOC 2012
    ... and ImageSets/Segmentation/trainaug.txt, SegmentationClassAug/*.png                        where they exist
    FOLDER/{train,val}.txt, images/*.jpg, labels/*.png, classes.json                               plain

classes.json: `{"classes": [{"id": 0, "name": "sky"}, ...], "ignore_label": 255}`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IGNORE = 255
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


@dataclass(frozen=True)
class Scene:
    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class SceneSplit:
    path: Path
    """The list of names."""
    scenes: tuple[Scene, ...]
    """In the order of the list."""
    classes: tuple[str, ...]
    fingerprint: str
    """sha256 of the names and the sizes of their files."""


def read_scenes(folder: Path, split: str) -> SceneSplit:
    """Reads and checks one split, `train` or `val`.

    For training the lists and labels of VOC's augmented set are taken where the folder has both.

    Raises:
        ValueError: the layout is neither, a list is empty, an image or its labels are absent.
    """
    if (folder / "ImageSets" / "Segmentation").is_dir():
        return _voc(folder, split)
    if (folder / "classes.json").is_file():
        classes = _classes(folder / "classes.json")
        return _split(folder / f"{split}.txt", folder / "images", folder / "labels", classes)
    raise ValueError(
        f"{folder} has neither ImageSets/Segmentation (VOC's layout) nor classes.json with {split}.txt, images and "
        "labels (the plain one)"
    )


def read_label(path: Path, classes: int) -> NDArray[np.uint8]:
    """(H, W) class of each pixel, IGNORE where none counts.

    Raises:
        ValueError: it cannot be read, is not an image of indices, or has an index that is no class.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise ValueError(
                    f"{path} has colors (mode {image.mode}), expected an index for each pixel: a PNG with a palette "
                    "or in gray"
                )
            label = np.array(image, dtype=np.uint8)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    wrong = np.unique(label[(label >= classes) & (label != IGNORE)])
    if len(wrong):
        raise ValueError(
            f"{path} has the class {wrong[0]}, but there are only {classes} (0 to {classes - 1}, and {IGNORE} for "
            "what does not count)"
        )
    return label


def _voc(folder: Path, split: str) -> SceneSplit:
    lists, images = folder / "ImageSets" / "Segmentation", folder / "JPEGImages"
    augmented = folder / "SegmentationClassAug"
    if split == "train" and (lists / "trainaug.txt").is_file() and augmented.is_dir():
        return _split(lists / "trainaug.txt", images, augmented, VOC_CLASSES)
    return _split(lists / f"{split}.txt", images, folder / "SegmentationClass", VOC_CLASSES)


def _split(path: Path, images: Path, labels: Path, classes: tuple[str, ...]) -> SceneSplit:
    try:
        names = path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise ValueError(f"the list of images {path} cannot be read ({error})") from error
    if not names:
        raise ValueError(f"{path} names no image")
    scenes = tuple(Scene(name, images / f"{name}.jpg", labels / f"{name}.png") for name in names)
    absent = [file for scene in scenes for file in (scene.image, scene.label) if not file.is_file()]
    if absent:
        raise ValueError(f"{path} names {len(names)} images, but {len(absent)} files are absent, such as {absent[0]}")
    facts = [(s.name, s.image.stat().st_size, s.label.stat().st_size) for s in scenes]
    return SceneSplit(path, scenes, classes, hashlib.sha256(json.dumps(facts).encode()).hexdigest())


def _classes(path: Path) -> tuple[str, ...]:
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        rows: Sequence[Any] = document["classes"]
        names = {int(row["id"]): str(row["name"]) for row in rows}
        ignored = document.get("ignore_label", IGNORE)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path} does not read {{"classes": [{{"id": 0, "name": ...}}, ...]}} ({type(error).__name__}: {error})'
        ) from error
    if sorted(names) != list(range(len(names))) or len(names) < 2:
        raise ValueError(f"{path} has the class ids {sorted(names)}; expected 0, 1, ... without a gap, at least two")
    if ignored != IGNORE:
        raise ValueError(f"{path} has ignore_label {ignored}; only {IGNORE} is read")
    return tuple(names[number] for number in sorted(names))
