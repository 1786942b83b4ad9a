"""Checks, before anything runs, that data folders have the layout that MMSegmentation expects.

DATA/VOCdevkit/VOC2012/          JPEGImages/, SegmentationClass/, SegmentationClassAug/, ImageSets/Segmentation/{train,aug,val}.txt
DATA/cityscapes/                 leftImg8bit/{train,val}/CITY/, gtFine/{train,val}/CITY/*_gtFine_labelTrainIds.png
DATA/ade/ADEChallengeData2016/   images/{training,validation}/, annotations/{training,validation}/
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from clove_hub.data.files import add_files, lines

from ..seeds import Found

PAGE = "https://mmsegmentation.readthedocs.io/en/latest/user_guides/2_dataset_prepare.html"
ROOTS = {"voc": "VOCdevkit/VOC2012", "cityscapes": "cityscapes", "ade20k": "ade/ADEChallengeData2016"}
"""Paths below the folder of data sets."""
PUBLISHED = {"voc": (10_582, 1_449), "cityscapes": (2_975, 500), "ade20k": (20_210, 2_000)}
"""Images in the published data sets: in training, and in the test split."""
Pair = tuple[Path, Path]
"""A photo and its mask."""
FEW = 4
"""Images per list in a rehearsal."""


def require_layout(layout: str, data: Path) -> Found:
    """Check a data set: every image of the splits, and its mask, exists.

    Args:
        layout: one of ROOTS.

    Raises:
        ValueError: something is missing; the message names it.
    """
    root = data / ROOTS[layout]
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder, but the data set should be there. How to get it: {PAGE}")
    train, test = (_pairs(layout, root, split) for split in ("train", "val"))
    digest = hashlib.sha256()
    for split, pairs in (("training", train), ("validation", test)):
        if not pairs:
            raise ValueError(f"{root} has no images for {split}. How to get them: {PAGE}")
        absent = [path for pair in pairs for path in pair if not path.is_file()]
        if absent:
            listed = ", ".join(map(str, absent[:3])) + (", ..." if len(absent) > 3 else "")
            raise ValueError(
                f"{len(pairs)} images and their masks for {split}: {len(absent)} files are missing: {listed}. How to get "
                f"them: {PAGE}"
            )
        add_files(digest, root, (path for pair in pairs for path in pair))
    return Found(len(train), len(test), digest.hexdigest())


def write_miniature(layout: str, data: Path, target: Path) -> Path:
    """Write a few images of a data set, as links in its own layout, on which a rehearsal is trained and scored.

    Returns:
        An image of the test split.
    """
    root, own = data.resolve() / ROOTS[layout], target / ROOTS[layout]
    if layout == "voc":
        for part in ("train", "aug", "val"):
            path = Path("ImageSets/Segmentation", f"{part}.txt")
            (own / path).parent.mkdir(parents=True, exist_ok=True)
            (own / path).write_text("".join(f"{name}\n" for name in lines(root / path)[:FEW]), encoding="utf-8")
        for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
            (own / folder).symlink_to(root / folder)
    else:
        for path in (path for split in ("train", "val") for pair in _pairs(layout, root, split)[:FEW] for path in pair):
            link = own / path.relative_to(root)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return _pairs(layout, own, "val")[0][0]


def _pairs(layout: str, root: Path, split: str) -> list[Pair]:
    return {"voc": _voc, "cityscapes": _cityscapes, "ade20k": _ade20k}[layout](root, split)


def _voc(root: Path, split: str) -> list[Pair]:
    lists = {"train": (("train", "SegmentationClass"), ("aug", "SegmentationClassAug"))}
    return [
        (root / "JPEGImages" / f"{name}.jpg", root / masks / f"{name}.png")
        for part, masks in lists.get(split, ((split, "SegmentationClass"),))
        for name in lines(root / "ImageSets" / "Segmentation" / f"{part}.txt")
    ]


def _cityscapes(root: Path, split: str) -> list[Pair]:
    photos = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    stems = [path.name.removesuffix("_leftImg8bit.png") for path in photos]
    masks = root / "gtFine" / split
    return [
        (path, masks / path.parent.name / f"{stem}_gtFine_labelTrainIds.png")
        for path, stem in zip(photos, stems, strict=True)
    ]


def _ade20k(root: Path, split: str) -> list[Pair]:
    folder = {"train": "training", "val": "validation"}[split]
    photos = sorted((root / "images" / folder).glob("*.jpg"))
    return [(path, root / "annotations" / folder / f"{path.stem}.png") for path in photos]
