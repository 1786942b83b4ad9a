"""Images with a mask each: the layouts of folders that the segmentation protocols read.

images/NAME.jpg, labels/NAME.png, SPLIT.txt, classes.json     one's own data; CamVid here
JPEGImages/NAME.jpg, SegmentationClass[Aug]/NAME.png, ImageSets/Segmentation/SPLIT.txt     PASCAL VOC 2012
leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, gtFine/SPLIT/CITY/*_gtFine_labelIds.png     Cityscapes
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .files import lines, require
from .images import SUFFIXES
from .subset import spread

VOID = 255
"""The index of pixels that have no class and do not count."""
VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
CITYSCAPES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Of the classes that are evaluated, in the `labelIds` images."""

Pair = tuple[Path, Path]
"""A photo and its mask."""


@dataclass(frozen=True)
class Segmented:
    """The images of one split."""

    pairs: list[Pair]
    classes: tuple[str, ...]
    layout: str
    """`folder`, `voc` or `cityscapes`."""

    def mask(self, pair: Pair, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """The class of each pixel, uint8 (H, W), and 255 where there is none.

        Args:
            size: width and height of the photo, which the mask must have too.

        Raises:
            ValueError: the mask is damaged, is not an index image, or has another size or an index out of range.
        """
        path = pair[1]
        mask = read_indices(path)
        if size is not None:
            same_size(path, mask, pair[0], size)
        if self.layout == "cityscapes":
            return _CLASS_OF_ID[mask]
        if wrong := [int(index) for index in np.unique(mask) if index >= len(self.classes) and index != VOID]:
            raise ValueError(
                f"{path} has the class {wrong[0]}; expected 0 to {len(self.classes) - 1}, "
                f"or {VOID} where a pixel has no class"
            )
        return mask

    def spread(self, limit: int | None) -> Segmented:
        """At most `limit` of the images, spread evenly over the list."""
        return replace(self, pairs=spread(self.pairs, limit))


def open_segmented(root: Path, split: str) -> Segmented:
    """Finds the images of a split and their masks, whichever the layout is.

    Raises:
        ValueError: it is none of the layouts, there is no such split, or a photo or mask is missing.
    """
    if (root / "classes.json").is_file():
        return _folder(root, split)
    if (root / "ImageSets" / "Segmentation").is_dir():
        return _voc(root, split)
    if (root / "leftImg8bit").is_dir():
        return _cityscapes(root, split)
    raise ValueError(
        f"{root} has none of the layouts for segmentation: classes.json with images/, labels/ and {split}.txt; "
        "ImageSets/Segmentation (PASCAL VOC); leftImg8bit and gtFine (Cityscapes)"
    )


def _folder(root: Path, split: str) -> Segmented:
    """`classes.json` is `{"classes": [{"id": 0, "name": "sky"}, ...]}` with ids from 0 upwards."""
    path = root / "classes.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["classes"]
        ids, names = [int(entry["id"]) for entry in entries], [str(entry["name"]) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error!r}); expected {{'classes': [{{'id': 0, 'name': ...}}, ...]}}"
        ) from error
    if not ids or ids != list(range(len(ids))):
        raise ValueError(f"{path} has the ids {ids}; expected 0, 1, 2, ... in this order")
    pairs = []
    for name in lines(root / f"{split}.txt"):
        photos = [root / "images" / f"{name}{suffix}" for suffix in SUFFIXES]
        photo = next((photo for photo in photos if photo.is_file()), None)
        if photo is None:
            raise ValueError(f"{root / 'images' / name}.* is missing; {split}.txt names it")
        pairs.append((photo, require(root / "labels" / f"{name}.png", f"the mask of {photo.name}")))
    return Segmented(pairs, tuple(names), "folder")


def _voc(root: Path, split: str) -> Segmented:
    """The masks of `SegmentationClassAug`, where there is this folder, for `trainaug` (Hariharan et al. 2011)."""
    augmented = root / "SegmentationClassAug"
    masks = augmented if split.endswith("aug") and augmented.is_dir() else root / "SegmentationClass"
    pairs = [
        (
            require(root / "JPEGImages" / f"{name}.jpg", f"the image {name} of {split}.txt"),
            require(masks / f"{name}.png", f"the mask of {name}"),
        )
        for name in lines(root / "ImageSets" / "Segmentation" / f"{split}.txt")
    ]
    return Segmented(pairs, VOC, "voc")


def _cityscapes(root: Path, split: str) -> Segmented:
    photos = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    if not photos:
        raise ValueError(f"{root / 'leftImg8bit' / split} has no CITY/*_leftImg8bit.png")
    pairs = []
    for photo in photos:
        name = photo.name.removesuffix("_leftImg8bit.png") + "_gtFine_labelIds.png"
        mask = root / "gtFine" / split / photo.parent.name / name
        pairs.append((photo, require(mask, f"the mask of {photo.name}")))
    return Segmented(pairs, CITYSCAPES, "cityscapes")


def _class_of_ids() -> NDArray[np.uint8]:
    table = np.full(256, VOID, dtype=np.uint8)
    table[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES))
    return table


_CLASS_OF_ID = _class_of_ids()


def read_indices(path: Path) -> NDArray[np.uint8]:
    """An image of whole numbers, one for each pixel, whatever they mean.

    Raises:
        ValueError: the file is missing or damaged, or its pixels are colors.
    """
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.array(image)
    except FileNotFoundError:
        raise ValueError(f"the mask {path} is missing") from None
    except Exception as error:  # as in `read_photo`
        raise ValueError(f"{path} cannot be read as a mask ({type(error).__name__}: {error})") from error
    if mode not in ("L", "P", "1"):
        raise ValueError(f"{path} is an image of mode {mode}; a mask has one 8-bit index for each pixel (mode L or P)")
    return pixels.astype(np.uint8)


def same_size(path: Path, mask: NDArray[np.uint8], photo: Path, size: tuple[int, int]) -> None:
    """Raises ValueError unless the mask has the photo's width and height."""
    height, width = mask.shape
    if (width, height) != size:
        raise ValueError(f"{path} is {width}x{height} pixels, but {photo} is {size[0]}x{size[1]}")
