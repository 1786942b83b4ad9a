"""Checks, before anything runs, that data folders have the layout that Detectron2 expects.

ROOT/coco/{train2017,val2017}/*.jpg            ROOT/coco/annotations/{instances,person_keypoints}_{train,val}2017.json
ROOT/lvis/lvis_v1_{train,val}.json             the images are COCO's; the val split takes some from train2017
ROOT/VOC2007/, ROOT/VOC2012/                   Annotations/, ImageSets/Main/, JPEGImages/
ROOT/cityscapes/leftImg8bit/{train,val}/CITY/  ROOT/cityscapes/gtFine/{train,val}/CITY/
ROOT/coco/{train2014,val2014}/*.jpg            ROOT/coco/annotations/densepose_{train,valminusminival,minival}2014.json
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from clove_hub.data.files import add_files
from clove_hub.documents import read_json
from clove_hub.runs import sha256

from ..seeds import Found

DATASETS_PAGE = "https://github.com/facebookresearch/detectron2/blob/main/datasets/README.md"
DENSEPOSE_PAGE = "https://github.com/facebookresearch/detectron2/blob/main/projects/DensePose/doc/DENSEPOSE_DATASETS.md"


def require_layout(name: str, root: Path) -> Found:
    """Check a data set: its annotations can be read, and every image that they list exists.

    Args:
        name: one of LAYOUTS.
        root: Detectron2's DETECTRON2_DATASETS.

    Raises:
        ValueError: something is missing; the message names it and its purpose.
    """
    if not root.is_dir():
        raise ValueError(
            f"{root} is not a folder. Give the folder of data sets by --data FOLDER or DETECTRON2_DATASETS; its layout: "
            f"{DATASETS_PAGE}"
        )
    return LAYOUTS[name](root)


# ---- COCO, LVIS, DensePose: one JSON file a split --------------------------------------------------------------------


def _listed(root: Path, title: str, page: str, splits: Sequence[tuple[str, str]]) -> Found:
    """Of files that list the images of a split, the test split last: each file, and the folder of its images."""
    paths = [(root / file, root / images) for file, images in splits]
    for file, images in paths:  # the quick checks first
        _require(file, Path.is_file, f"{title} has its annotations in this file", page)
        _require(images, Path.is_dir, f"{title} has its images in this folder", page)
    *train, test = [_images(file, images, title) for file, images in paths]
    digest = hashlib.sha256("".join(sha256(file) for file, _ in paths).encode())
    for listed in (*train, test):
        add_files(digest, root, listed)
    return Found(sum(map(len, train)), len(test), digest.hexdigest())


def _images(annotations: Path, images: Path, title: str) -> list[Path]:
    """The images that a file lists, after checking that each exists."""
    document = read_json(annotations)
    rows = document.get("images") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{annotations} lists no images: expected {title}'s own file, with a list of `images`")
    if not document.get("annotations"):
        raise ValueError(f"{annotations} has no annotations: expected {title}'s own file, not that of a test split")
    paths = [image_path(row, images) for row in rows]
    present = {folder: set(os.listdir(folder)) for folder in {path.parent for path in paths} if folder.is_dir()}
    absent = [path for path in paths if path.name not in present.get(path.parent, ())]
    _require_none(absent, len(rows), f"{annotations} lists")
    return paths


def image_path(row: Mapping[str, Any], images: Path) -> Path:
    """The path where Detectron2 looks for an image; in LVIS v1 it is the last two parts of the image's COCO URL."""
    if "file_name" not in row and "coco_url" in row:
        return images.joinpath(*str(row["coco_url"]).split("/")[-2:])
    return images / str(row.get("file_name"))


# ---- PASCAL VOC: a file for each image -------------------------------------------------------------------------------


def _voc(root: Path) -> Found:
    for year in ("VOC2007", "VOC2012"):
        for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
            _require(root / year / folder, Path.is_dir, "PASCAL VOC has this folder", DATASETS_PAGE)
    counts, digest = [], hashlib.sha256()
    for year, split in VOC_SPLITS:
        path = root / year / "ImageSets" / "Main" / f"{split}.txt"
        _require(path, Path.is_file, "PASCAL VOC lists a split's images in this file", DATASETS_PAGE)
        names = path.read_text(encoding="utf-8").split()
        if not names:
            raise ValueError(f"{path} is empty: expected the name of an image on each line")
        for folder, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
            present = set(os.listdir(root / year / folder))
            absent = [root / year / folder / f"{name}{suffix}" for name in names if f"{name}{suffix}" not in present]
            _require_none(absent, len(names), f"{path} names")
        for folder, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
            add_files(digest, root, (root / year / folder / f"{name}{suffix}" for name in names))
        counts.append(len(names))
    return Found(counts[0] + counts[1], counts[2], digest.hexdigest())


# ---- Cityscapes: three files for each image, in a folder for each city -----------------------------------------------


def _cityscapes(root: Path) -> Found:
    counts, digest = {}, hashlib.sha256()
    for split in ("train", "val"):
        images, truth = (root / "cityscapes" / part / split for part in ("leftImg8bit", "gtFine"))
        for folder in (images, truth):
            _require(folder, Path.is_dir, "Cityscapes has a folder for each city in this folder", DATASETS_PAGE)
        stems = []
        photos = sorted(images.glob("*/*"))
        for path in photos:
            if not path.name.endswith("_leftImg8bit.png"):
                raise ValueError(
                    f"{path} is not an image of Cityscapes (*_leftImg8bit.png), and Detectron2 would fail on it: "
                    "move it out of the folder"
                )
            stems.append(f"{path.parent.name}/{path.name.removesuffix('leftImg8bit.png')}gtFine")
        if not stems:
            raise ValueError(f"{images} has no images: looked for CITY/*_leftImg8bit.png ({DATASETS_PAGE})")
        kinds = ("polygons.json", "instanceIds.png", "labelIds.png")
        files = [truth / f"{stem}_{kind}" for stem in stems for kind in kinds]
        _require_none([path for path in files if not path.is_file()], len(files), f"the images in {images} need")
        add_files(digest, root, [*files, *photos])
        counts[split] = len(stems)
    return Found(counts["train"], counts["val"], digest.hexdigest())


# ---- pieces ----------------------------------------------------------------------------------------------------------


def _require(path: Path, kind: Callable[[Path], bool], what: str, page: str) -> None:
    if not kind(path):
        raise ValueError(f"{path} is missing: {what}. How to get it: {page}")


def _require_none(absent: Sequence[Path], total: int, what: str) -> None:
    if absent:
        raise ValueError(
            f"{what} {total} files, of which {len(absent)} are missing: {', '.join(map(str, absent[:3]))}"
            + (", ..." if len(absent) > 3 else "")
        )


Splits = tuple[tuple[str, str], ...]
"""Splits of one JSON file each, the test split last: the file, and the folder of its images."""


def _coco(stem: str) -> Splits:
    return tuple((f"coco/annotations/{stem}_{split}2017.json", f"coco/{split}2017") for split in ("train", "val"))


LISTED: dict[str, Splits] = {
    "coco": _coco("instances"),
    "coco_keypoints": _coco("person_keypoints"),
    "lvis": tuple((f"lvis/lvis_v1_{split}.json", "coco") for split in ("train", "val")),
    "densepose": tuple(
        (f"coco/annotations/densepose_{name}2014.json", f"coco/{images}2014")
        for name, images in (("train", "train"), ("valminusminival", "val"), ("minival", "val"))
    ),
}
VOC_SPLITS = (("VOC2007", "trainval"), ("VOC2012", "trainval"), ("VOC2007", "test"))
_TITLES = {"lvis": ("LVIS v1", DATASETS_PAGE), "densepose": ("DensePose-COCO 2014", DENSEPOSE_PAGE)}

LAYOUTS: dict[str, Callable[[Path], Found]] = {"voc": _voc, "cityscapes": _cityscapes}
for _name, _splits in LISTED.items():
    _title, _page = _TITLES.get(_name, ("COCO 2017", DATASETS_PAGE))
    LAYOUTS[_name] = partial(_listed, title=_title, page=_page, splits=_splits)

PUBLISHED = {
    "coco": (118_287, 5_000),
    "coco_keypoints": (118_287, 5_000),
    "lvis": (100_170, 19_809),
    "voc": (16_551, 4_952),
    "cityscapes": (2_975, 500),
    "densepose": (32_421, 1_508),
}
"""Images in the published data sets: in training, and in the test split."""
