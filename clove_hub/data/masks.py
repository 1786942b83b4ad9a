"""Images with a mask each: the layouts of folders that segmentation reads, in evaluation and in fine-tuning.

images/NAME.jpg, labels/NAME.png, SPLIT.txt, classes.json     one's own data; CamVid here
JPEGImages/NAME.jpg, SegmentationClass[Aug]/NAME.png, ImageSets/Segmentation/SPLIT.txt     PASCAL VOC 2012; with a
    classes.json, or the labelmap.txt that CVAT exports, other classes than VOC's
leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, gtFine/SPLIT/CITY/*_gtFine_labelIds.png     Cityscapes
images/{training,validation}/NAME.jpg, annotations/{training,validation}/NAME.png     ADE20K (ADEChallengeData2016), 150 classes
[images/]{train,val}2017/NAME.jpg, stuffthingmaps/{train,val}2017/NAME.png     COCO-Stuff 164k; the masks may lie in annotations/ and
    have MMSegmentation's numbers (NAME_labelTrainIds.png). The split `val` has the 171 classes, `val-27` their 27 supercategories,
    `val-things` the 12 of objects and `val-stuff` the 15 of stuff, without a class where there is something else

A mask holds one whole number for each pixel, in any kind of PNG that can (see `read_indices`). What the numbers mean is
said by the layout or by classes.json:

    {"classes": [{"id": 0, "name": "sky"}, ...], "ignore_label": 255}

`classes` may also be a list of names or a table of names by id; ids need not start at 0 or be consecutive.
`ignore_label` (255 if not given) marks pixels that have no class and do not count. With `"ignore_label": null` every
pixel counts, and in a data set of two classes the masks may hold 0 and 255 for the first and the second.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clove_hub.documents import read_json

from .files import lines, pictures_by_name, spread
from .mask_classes import ADE20K, NO_THING, STUFF, THINGS
from .values import label, some, whole

log = logging.getLogger(__name__)

VOID = 255
"""The index of pixels that have no class and do not count."""
_LARGEST = 65535
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
    images: Path
    """The folder of the photos; an image's name is its path in this folder without the ending."""
    values: Mapping[int, int]
    """The class, from 0, of each value that a mask may hold; VOID for the values without a class."""

    def name(self, pair: Pair) -> str:
        """The image's name, as the list of the split gives it."""
        return pair[0].relative_to(self.images).with_suffix("").as_posix()

    def mask(self, pair: Pair, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        """The class of each pixel, uint8 (H, W), and 255 where there is none.

        Args:
            size: width and height of the upright photo, which the mask must have too.

        Raises:
            ValueError: the mask is damaged, is not an index image, or has another size or an index out of range.
        """
        path = pair[1]
        mask = read_indices(path)
        if size is not None:
            same_size(path, mask, pair[0], size)
        table = np.full(int(mask.max(initial=0)) + 1, VOID, dtype=np.uint8)
        for value in np.bincount(mask.ravel()).nonzero()[0].tolist():
            if value not in self.values:
                ids = sorted(value for value, index in self.values.items() if index != VOID)
                void = sorted(self.values.keys() - set(ids))
                span = f"{ids[0]} to {ids[-1]}" if ids == list(range(ids[0], ids[-1] + 1)) else some(ids)
                other = f", or {some(void)} where a pixel has no class" if void else ""
                raise ValueError(f"{path} has the class {value}; expected {span}{other}")
            table[value] = self.values[value]
        return table[mask]

    def of(self, kept: Sequence[int]) -> Segmented:
        """The images with these numbers."""
        return replace(self, pairs=[self.pairs[number] for number in kept])

    def spread(self, limit: int | None) -> Segmented:
        """At most `limit` of the images, spread evenly over the list."""
        return replace(self, pairs=spread(self.pairs, limit))

    @property
    def fingerprint(self) -> str:
        """sha256 of the names and sizes of the files, and of a meaning of the masks' values that is not the usual."""
        facts: list[Any] = [(self.name(p), p[0].stat().st_size, p[1].stat().st_size) for p in self.pairs]
        if self.values != _values(range(len(self.classes)), VOID):
            facts.append(sorted(self.values.items()))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def open_segmented(root: Path, split: str) -> Segmented:
    """Finds the images of a split and their masks, whichever the layout is.

    Raises:
        ValueError: it is none of the layouts, there is no such split, a photo or mask is missing, or the masks of two
            classes hold nothing but 0 and 255 and nothing says what 255 is.
    """
    if (root / "ImageSets" / "Segmentation").is_dir():
        return _voc(root, split)
    if (root / "classes.json").is_file():
        return _declared(root, split, root / f"{split}.txt", root / "images", root / "labels")
    if (root / "leftImg8bit").is_dir():
        return _cityscapes(root, split)
    if (root / "annotations" / "training").is_dir():
        return _ade20k(root, split)
    if coco_stuff_masks(root):
        return _coco_stuff(root, split)
    raise ValueError(
        f"{root} has none of the layouts for segmentation: classes.json with images/, labels/ and {split}.txt; "
        "ImageSets/Segmentation (PASCAL VOC); leftImg8bit and gtFine (Cityscapes); images/training and annotations/training "
        "(ADE20K); stuffthingmaps/train2017 with train2017 or images/train2017 (COCO-Stuff)"
    )


def segmentation_splits(root: Path) -> list[str]:
    """The splits of a folder in any of the layouts; none if it is in none of them."""
    if (root / "classes.json").is_file() and not (root / "ImageSets" / "Segmentation").is_dir():
        return sorted(path.stem for path in root.glob("*.txt"))
    if lists := sorted((root / "ImageSets" / "Segmentation").glob("*.txt")):
        return [path.stem for path in lists if path.stem != "trainval"]  # which is the two others
    if cities := sorted(path.name for path in (root / "leftImg8bit").glob("*") if path.is_dir()):
        return cities
    if (root / "annotations" / "training").is_dir():
        return [split for split, folder in _ADE20K_SPLITS.items() if (root / "annotations" / folder).is_dir()]
    return sorted(masks.name.removesuffix("2017") for masks in coco_stuff_masks(root))


def training_split(root: Path) -> str:
    """The split to train on: VOC's augmented one where the folder has its list and its masks (Hariharan et al. 2011)."""
    listed = root / "ImageSets" / "Segmentation" / "trainaug.txt"
    return "trainaug" if listed.is_file() and (root / "SegmentationClassAug").is_dir() else "train"


def _declared(root: Path, split: str, listed: Path, images: Path, masks: Path) -> Segmented:
    """The images of a list, with the classes of classes.json."""
    classes, ids, ignored = _classes(root / "classes.json")
    part = Segmented(_pairs(listed, images, masks), classes, images, _values(ids, ignored))
    return _black_and_white(part, ids, ignored, root, split)


def _black_and_white(part: Segmented, ids: list[int], ignored: int | None, root: Path, split: str) -> Segmented:
    """In masks of two classes 255 may mean no class, or the second one of masks drawn in black and white.

    Where it means none and the second class has no pixel, whatever predicts the first class alone would score 100.
    """
    if len(ids) != 2 or VOID in ids or ignored not in (None, VOID):
        return part
    if ignored is None:
        return replace(part, values={ids[0]: 0, ids[1]: 1, VOID: 1})
    void = False
    for _, path in part.pairs:  # usually the first has both classes
        mask = read_indices(path)
        if bool((mask == ids[1]).any()):
            return part
        void = void or bool((mask == VOID).any())
    if void:
        raise ValueError(
            f"the {len(part.pairs)} masks of {root} ({split}) hold no pixel of {part.classes[1]!r} ({ids[1]}), but the "
            f'value 255, which means "no class": if 255 is {part.classes[1]!r}, write "ignore_label": null into '
            f'{root / "classes.json"}, beside "classes": {json.dumps(list(part.classes))}; otherwise choose images with both classes'
        )
    return part


def _values(ids: Sequence[int], ignored: int | None) -> dict[int, int]:
    return {value: index for index, value in enumerate(ids)} | ({} if ignored is None else {ignored: VOID})


def _classes(path: Path) -> tuple[tuple[str, ...], list[int], int | None]:
    """Names, their ids in rising order, and the value of pixels without a class."""
    form = 'expected {"classes": [{"id": 0, "name": ...}, ...]}'
    document = read_json(path)
    rows = document.get("classes", document) if isinstance(document, dict) else document
    if isinstance(rows, list) and rows and all(isinstance(row, str) for row in rows):
        entries: list[tuple[Any, Any]] = list(enumerate(rows))
    elif isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        entries = [(row.get("id"), row.get("name")) for row in rows]
    elif isinstance(rows, dict) and rows:
        entries = [(id, name) for id, name in rows.items() if id != "ignore_label"]
    else:
        raise ValueError(f"{path} cannot be read as a list of classes; {form}")
    pairs = []
    for entry in entries:
        id, name = whole(entry[0]), label(entry[1])
        if id is None or not name:
            raise ValueError(f"{path} cannot be read: the class {entry!r} lacks an integer id or a name; {form}")
        pairs.append((id, name))
    pairs.sort()
    ids, names = [id for id, _ in pairs], tuple(name for _, name in pairs)
    for what, found in (("id", ids), ("name", names)):
        if twice := [value for place, value in enumerate(found) if value in found[:place]]:
            raise ValueError(f"{path} has the {what} {twice[0]!r} twice: give each class its own")
    if not 2 <= len(ids) <= VOID or ids[0] < 0 or ids[-1] > _LARGEST:
        raise ValueError(
            f"{path} has the ids [{some(ids)}]; expected from 2 to {VOID} classes with ids from 0 to {_LARGEST}"
        )
    given = document.get("ignore_label", VOID) if isinstance(document, dict) else VOID
    ignored = None if given is None else whole(given)
    if given is not None and ignored is None:
        raise ValueError(f"{path} has the ignore_label {given!r}; expected a whole number, or null for none")
    if ignored in ids and (ignored != VOID or "ignore_label" in document):
        raise ValueError(
            f"{path} has the ignore_label {ignored}, which is also the id of {names[ids.index(ignored)]!r}: remove the "
            "class from the list if its pixels do not count, or give another ignore_label"
        )
    if ids != list(range(len(ids))):
        log.info("%s: the ids %s are read as the classes 0 to %d, in this order", path, some(ids), len(ids) - 1)
    return names, ids, None if ignored in ids else ignored


def _voc(root: Path, split: str) -> Segmented:
    """The masks of `SegmentationClassAug`, where there is this folder, for `trainaug` (Hariharan et al. 2011)."""
    augmented = root / "SegmentationClassAug"
    masks = augmented if split.endswith("aug") and augmented.is_dir() else root / "SegmentationClass"
    images = root / "JPEGImages"
    listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if (root / "classes.json").is_file():
        return _declared(root, split, listed, images, masks)
    classes: tuple[str, ...] = VOC
    if (labels := root / "labelmap.txt").is_file():  # name:color:parts:actions
        classes = tuple(line.split(":")[0].strip() for line in lines(labels) if not line.startswith("#"))
    ids = list(range(len(classes)))
    part = Segmented(_pairs(listed, images, masks), classes, images, _values(ids, VOID))
    return _black_and_white(part, ids, VOID, root, split)


def _pairs(listed: Path, images: Path, masks: Path) -> list[Pair]:
    """The images and masks that a list names, without an ending in each line."""
    names = lines(listed)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"the list {listed} names {len(twice)} images twice, such as {twice[0]}: remove them")
    photos = pictures_by_name(images)
    pairs = []
    for name in names:
        if name not in photos:
            raise ValueError(f"{images / name}.* is missing; {listed.name} names it")
        path = masks / f"{name}.png"
        if not path.is_file() and (others := sorted(path.parent.glob(f"{glob.escape(path.stem)}.*"))):
            raise ValueError(f"the mask of {photos[name].name} is {others[0]}: store it as {path.name}")
        pairs.append((photos[name], path))
    return _present(pairs)


def _present(pairs: list[Pair]) -> list[Pair]:
    if absent := next((pair for pair in pairs if not pair[1].is_file()), None):
        raise ValueError(f"the mask of {absent[0].name} is missing: {absent[1]}")
    return pairs


def _cityscapes(root: Path, split: str) -> Segmented:
    photos = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    if not photos:
        raise ValueError(f"{root / 'leftImg8bit' / split} has no CITY/*_leftImg8bit.png")
    masks = root / "gtFine" / split
    pairs = [(p, masks / p.parent.name / p.name.replace("_leftImg8bit.", "_gtFine_labelIds.")) for p in photos]
    values = dict.fromkeys([*range(CITYSCAPES_IDS[-1]), 255], VOID) | _values(CITYSCAPES_IDS, None)
    return Segmented(_present(pairs), CITYSCAPES, root / "leftImg8bit" / split, values)


_ADE20K_SPLITS = {"train": "training", "val": "validation"}


def _ade20k(root: Path, split: str) -> Segmented:
    """The 150 classes of the challenge; the masks' 0, for all other things, is no class."""
    if split not in _ADE20K_SPLITS:
        raise ValueError(f"ADE20K has no split {split!r}: choose {' or '.join(_ADE20K_SPLITS)}")
    images, masks = (root / kind / _ADE20K_SPLITS[split] for kind in ("images", "annotations"))
    return Segmented(_beside(masks, images), ADE20K, images, {0: VOID} | {1 + n: n for n in range(len(ADE20K))})


def coco_stuff_masks(root: Path) -> list[Path]:
    """The folders of COCO-Stuff's masks, one for each split."""
    found = [root / kind / f"{split}2017" for kind in ("stuffthingmaps", "annotations") for split in ("train", "val")]
    return [folder for folder in found if folder.is_dir() and next(folder.glob("*.png"), None)]


def _coco_stuff(root: Path, split: str) -> Segmented:
    """The 171 classes, or their supercategories; a mask has the categories' ids less one, and 255 where there is none."""
    name, _, kind = split.removesuffix("2017").partition("-")
    masks = next((folder for folder in coco_stuff_masks(root) if folder.name == f"{name}2017"), None)
    kinds = {"": THINGS | STUFF, "27": THINGS | STUFF, "things": THINGS, "stuff": STUFF}
    if masks is None or kind not in kinds:
        names = [f"{folder.name.removesuffix('2017')}{end}" for folder in coco_stuff_masks(root) for end in ("", "-27")]
        raise ValueError(
            f"{root} has no split {split!r}: choose {', '.join(names)}, or one that ends in -things or -stuff"
        )
    images = next((folder for folder in (root / "images" / masks.name, root / masks.name) if folder.is_dir()), None)
    if images is None:
        raise ValueError(
            f"the photos of {masks} are missing: expected {root / masks.name} or {root / 'images' / masks.name}"
        )
    families = {one: family for family, names in (THINGS | STUFF).items() for one in names.split(", ")}
    things = [one for names in THINGS.values() for one in names.split(", ")]
    fine = things + sorted(families.keys() - set(things))
    classes = tuple(fine) if not kind else tuple(kinds[kind])
    index = {one: place for place, one in enumerate(classes)}
    chosen = [index.get(families[one] if kind else one, VOID) for one in fine]
    numbered = next(masks.glob("*_labelTrainIds.png"), None) is not None
    numbers = range(len(fine)) if numbered else [n for n in range(len(fine) + len(NO_THING)) if n not in NO_THING]
    values = dict(zip(numbers, chosen, strict=True)) | {VOID: VOID}
    return Segmented(_beside(masks, images, "_labelTrainIds" if numbered else ""), classes, images, values)


def _beside(masks: Path, images: Path, ending: str = "") -> list[Pair]:
    """Each mask of a folder with its photo."""
    photos = pictures_by_name(images)
    pairs = []
    for mask in sorted(masks.glob(f"*{ending}.png")):
        name = mask.stem.removesuffix(ending)
        if name not in photos:
            raise ValueError(f"the photo of the mask {mask} is missing: {images / name}.*")
        pairs.append((photos[name], mask))
    if not pairs:
        raise ValueError(f"{masks} has no masks (*{ending}.png)")
    return pairs


# ---- pixels ----------------------------------------------------------------------------------------------------------


def read_indices(path: Path) -> NDArray[np.int32]:
    """An image of whole numbers from 0 to 65535, one for each pixel, whatever they mean: int32 (H, W).

    Read are palette images (the numbers, not the colors), gray ones of 1 to 16 bits, and images whose colors are
    gray and opaque. A gray PNG of 2 or 4 bits, which viewers show with its numbers multiplied, is read as stored.

    Raises:
        ValueError: the file is missing or damaged, or its pixels are colors.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            kind, mode, pixels = image.format, image.mode, np.array(image)
    except FileNotFoundError:
        raise ValueError(f"the mask {path} is missing") from None
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise ValueError(f"{path} cannot be read as a mask ({type(error).__name__}: {error})") from error
    depth = data[24] if kind == "PNG" else 8  # bits of a sample, in PNG's head
    reason = ""
    if kind == "JPEG":
        reason = "its format is JPEG, which changes the numbers"
    elif mode in ("RGB", "RGBA", "LA"):
        if depth == 16:
            reason = "it has colors of 16 bits"
        elif mode in ("RGBA", "LA") and int(pixels[..., -1].min()) < 255:
            reason = "it has transparent pixels"
        elif mode != "LA" and bool((pixels[..., :3] != pixels[..., :1]).any()):
            reason = "it has colors"
        pixels = pixels[..., 0]
    elif mode not in ("1", "L", "P", "I") and not mode.startswith("I;16"):
        reason = "its pixels are not whole numbers"
    elif mode == "L" and depth in (2, 4):
        pixels = pixels // (85 if depth == 2 else 17)
    pixels = pixels.astype(np.int32)
    if not reason and not 0 <= int(pixels.min()) <= int(pixels.max()) <= _LARGEST:
        reason = f"it has numbers from {pixels.min()} to {pixels.max()}"
    if reason:
        raise ValueError(
            f"{path} is an image of mode {mode}, but {reason}; a mask has one index from 0 to {_LARGEST} for each pixel: "
            "store it as a PNG in gray or with a palette"
        )
    return pixels


def same_size(path: Path, mask: NDArray[Any], photo: Path, size: tuple[int, int]) -> None:
    """Raises ValueError unless the mask has the photo's width and height, upright as its EXIF orientation says."""
    height, width = mask.shape
    if (width, height) != size:
        turned = ", turned by its EXIF orientation" if (height, width) == size else ""
        raise ValueError(f"{path} is {width}x{height} pixels, but {photo} is {size[0]}x{size[1]}{turned}")
