"""PASCAL VOC's annotations: boxes in an XML file for each image, and lists of the images that show a class.

VOC2007/Annotations/NAME.xml, JPEGImages/NAME.jpg, ImageSets/Main/{train,val}.txt     boxes; FOLDER or FOLDER/VOC*
{train,val}/NAME.xml beside NAME.jpg (or valid/, as Roboflow exports it)              boxes
ImageSets/Main/CLASS_SPLIT.txt, JPEGImages/NAME.jpg                                   which images show a class

VOC counts pixels from 1 and includes the last one, so a box is xmin - 1 to xmax; if a data set has a number below 1,
its exporter counted from 0, and the box is xmin to xmax. `difficult` objects are not trained on and, like crowds in
COCO, count neither as found nor as missed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from clove_hub.documents import reason

from .coco import CocoSplit, Task, aligned, read_split, split_of
from .coco_document import Row, repaired
from .files import add_files, lines, pictures_by_name
from .images import read_image
from .values import number, some, whole

log = logging.getLogger(__name__)

UNSURE = -1
"""In `Truth.labels`: the image counts neither for nor against the class."""


# ---- boxes -----------------------------------------------------------------------------------------------------------


def has_boxes(folder: Path) -> bool:
    """Whether the folder has boxes in VOC's XML."""
    return bool(_years(folder)) or any((folder / "train").glob("*.xml"))


def read_splits(folder: Path, task: Task, train: str = "train", test: str = "val") -> tuple[CocoSplit, CocoSplit]:
    """The split that is trained on and the one that is scored, of COCO's or VOC's format, with the same categories.

    Those of VOC are the names in both splits, in alphabetical order.

    Args:
        train: name of a split; those of VOC's XML are always `train` and `val`.
        test: the same.

    Raises:
        ValueError: the folder has none of the layouts, or something is wrong in it; the message names what.
    """
    if not has_boxes(folder):
        learned = read_split(folder, train, task, scored=False)
        return learned, aligned(learned, read_split(folder, test, task))
    if (train, test) != ("train", "val"):
        raise ValueError(
            f"data.train={train} data.test={test}: {folder} has PASCAL VOC's annotations, whose splits are always train and "
            "val: leave both out"
        )
    if task != "detection":
        raise ValueError(f"{folder} has PASCAL VOC's annotations, which are only boxes: choose the task detection")
    parts = [_read(folder, split) for split in ("train", "val")]
    objects = [row for document, _, _, _ in parts for row in document["annotations"]]
    shift = _first_pixel(objects, folder)
    ids = {name: place for place, name in enumerate(sorted({row["category"] for row in objects}), start=1)}
    for row in objects:
        x0, y0, x1, y1 = row["bbox"]
        row |= {
            "category_id": ids[row["category"]],
            "bbox": [x0 - shift, y0 - shift, x1 - x0 + shift, y1 - y0 + shift],
        }
    categories = [{"id": id, "name": name} for name, id in ids.items()]
    learned, scored = (
        split_of(repaired(document | {"categories": categories}, path), photos, path, task, fingerprint, has_truth)
        for has_truth, (document, photos, path, fingerprint) in zip((False, True), parts, strict=True)
    )
    return learned, scored


@dataclass(frozen=True)
class Boxed:
    """An image with the boxes of all its objects, the difficult ones too."""

    photo: Path
    boxes: NDArray[np.float64]
    """(N, 4): x0, y0, x1, y1 in pixels, of which the last column and row are beyond the object."""
    names: tuple[str, ...]
    """Of the N objects' categories."""


def read_boxes(folder: Path, split: str) -> list[Boxed]:
    """The images of a split in VOC's format, with their boxes.

    Raises:
        ValueError: there is no such split, or something is wrong in it; the message names what.
    """
    document, photos, _, _ = _read(folder, split)
    shift = _first_pixel(document["annotations"], folder)
    own: list[list[Row]] = [[] for _ in photos]
    for row in document["annotations"]:
        own[row["image_id"] - 1].append(row)
    found = []
    for photo, rows in zip(photos, own, strict=True):
        boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
        boxes[:, :2] -= shift
        found.append(Boxed(photo, boxes, tuple(row["category"] for row in rows)))
    return found


def _first_pixel(objects: list[Row], folder: Path) -> float:
    """The number of the first pixel: 1, or 0 where a box begins below 1."""
    if min((min(row["bbox"][:2]) for row in objects), default=1.0) >= 1:
        return 1.0
    log.info("%s: its boxes count pixels from 0 (a box begins below 1)", folder)
    return 0.0


def _read(folder: Path, split: str) -> tuple[dict[str, list[Row]], list[Path], Path, str]:
    """A split as it stands in its files: `images`, and `annotations` with x0, y0, x1, y1 as their box.

    Returns:
        These, the images' paths, the list of the images or their folder, and sha256 of the annotations and of the
        names and sizes of the images.
    """
    path, found = _listed(folder, split)
    digest = hashlib.sha256()
    images: list[Row] = []
    objects: list[Row] = []
    unsized = []
    for place, (xml, photo) in enumerate(found, start=1):
        data = xml.read_bytes()
        digest.update(f"{xml.name}\0{len(data)}\n".encode() + data)
        try:
            root = ElementTree.fromstring(data)
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise ValueError(f"{xml} cannot be read as XML ({error})") from error
        height, width = (whole(_text(root, f"size/{side}")) for side in ("height", "width"))
        if not height or not width:
            height, width = read_image(photo).shape[:2]
            unsized.append(xml.name)
        images.append({"id": place, "file_name": photo.name, "height": height, "width": width})
        for entry in root.findall("object"):  # by its own name and box: its parts have names and boxes too
            name = _text(entry, "name")
            sides = [number(_text(entry, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
            if not name or None in sides:
                raise ValueError(
                    f"{xml} has an object {name!r} without a name, or without bndbox/xmin, ymin, xmax and ymax"
                )
            x0, y0, x1, y1 = (side for side in sides if side is not None)
            corners = [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]
            crowd = int(whole(_text(entry, "difficult")) == 1)
            facts = {"id": len(objects) + 1, "image_id": place, "iscrowd": crowd}
            objects.append(facts | {"category": name, "bbox": corners})
    if unsized:
        log.warning(
            "%s: %d files lack the size of their image; it is read from the images: %s",
            path,
            len(unsized),
            some(unsized),
        )
    photos = [photo for _, photo in found]
    for photo in photos:
        add_files(digest, photo.parent, [photo])
    return {"images": images, "annotations": objects}, photos, path, digest.hexdigest()


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _years(folder: Path) -> list[Path]:
    """The folder, or those in it, that have VOC's layout."""
    return [
        place
        for place in (folder, *sorted(folder.glob("VOC*")))
        if (place / "ImageSets" / "Main").is_dir() and (place / "Annotations").is_dir()
    ]


def _listed(folder: Path, split: str) -> tuple[Path, list[tuple[Path, Path]]]:
    """Where a split is, and its annotations and images."""
    found: list[tuple[Path, Path]] = []
    if years := _years(folder):
        lists = [year / "ImageSets" / "Main" / f"{split}.txt" for year in years]
        present = [path for path in lists if path.is_file()]
        if not present:
            raise ValueError(f"{lists[0]} is missing: it names the images of the split {split}, one in each line")
        for path in present:
            year = path.parents[2]
            photos = pictures_by_name(year / "JPEGImages")
            found += [_pair(year / "Annotations" / f"{name}.xml", name, photos) for name in lines(path)]
        return present[0], found
    names = (split, *(("valid",) if split == "val" else ()))
    place = next((folder / name for name in names if any((folder / name).glob("*.xml"))), None)
    if place is None:
        raise ValueError(
            f"{folder} has no XML files in {' or '.join(names)}: expected one beside each image of the split"
        )
    photos = pictures_by_name(place)
    found = [_pair(xml, xml.stem, photos) for xml in sorted(place.glob("*.xml"))]
    if others := sorted(set(photos) - {xml.stem for xml, _ in found}):
        log.warning("%s: %d images have no XML file and are left out: %s", place, len(others), some(others))
    return place, found


def _pair(xml: Path, name: str, photos: Mapping[str, Path]) -> tuple[Path, Path]:
    """An annotation and its image: the one of its name, or else the one that it names."""
    try:
        if name in photos:
            xml.stat()
            return xml, photos[name]
        told = ElementTree.fromstring(xml.read_bytes()).findtext("filename") or ""
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{xml} cannot be read ({reason(error)})") from error
    stem = told.strip().replace("\\", "/").rpartition("/")[2]
    for form in (stem, stem.rpartition(".")[0]):
        if form in photos:
            return xml, photos[form]
    raise ValueError(f"the image of {xml} is missing: there is neither {name}.* nor its filename {told.strip()!r}")


# ---- lists of images that show a class -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """Images, and for each class whether it is in them."""

    photos: list[Path]
    labels: NDArray[np.int8]
    """(classes, images): 1, 0 or UNSURE."""
    classes: list[str]

    def of(self, kept: list[int]) -> Truth:
        """The images with these numbers."""
        return Truth([self.photos[number] for number in kept], self.labels[:, kept], self.classes)


def read_lists(root: Path, split: str) -> Truth:
    """PASCAL VOC's classification lists: 1 has the class, -1 has not, 0 shows only difficult examples of it.

    Raises:
        ValueError: there is no list, two of them name other images, a line is malformed, or an image is missing.
    """
    folder = root / "ImageSets" / "Main"
    paths = sorted(folder.glob(f"*_{split}.txt"))
    if not paths:
        raise ValueError(f"{folder} has no list CLASS_{split}.txt")
    names: list[str] = []
    rows = []
    for path in paths:
        entries = [line.split() for line in lines(path)]
        if wrong := [entry for entry in entries if len(entry) != 2 or entry[1] not in ("1", "+1", "-1", "0")]:
            raise ValueError(f"{path} has the line {' '.join(wrong[0])!r}; expected a name and 1, -1 or 0")
        own = [name for name, _ in entries]
        if names and own != names:
            raise ValueError(f"{path} lists other images than {paths[0]}")
        names = own
        rows.append([{"1": 1, "+1": 1, "-1": 0, "0": UNSURE}[label] for _, label in entries])
    photos = pictures_by_name(root / "JPEGImages")
    if missing := [name for name in names if name not in photos]:
        raise ValueError(
            f"the image {missing[0]} of {paths[0].name} is missing: {root / 'JPEGImages' / missing[0]}.jpg"
        )
    classes = [path.stem.removesuffix(f"_{split}") for path in paths]
    return Truth([photos[name] for name in names], np.array(rows, dtype=np.int8), classes)
