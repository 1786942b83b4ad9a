"""Folders in the layouts of evaluation's protocols, made of photos with COCO's annotations, of clips and of masks.

What stands in a label is what people have drawn; for `match` it is a photo seen from elsewhere, and for `depth` the row and the
class of a pixel of a street, which is no measured distance: it asks whether the features know what is road, house or sky.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clove_hub.data.clips import find_clips, read_objects
from clove_hub.data.masks import open_segmented

SPLITS = {"train": "trainval", "val": "test"}
"""COCO's splits and what they are called in VOC's lists."""
FEWEST = 8
"""Images of a class in each split."""
POINTS = 12
FARTHEST = 10.0
"""Meters."""


def voc_like(coco: Path, out: Path) -> Path:
    """PASCAL VOC's layout: lists of images for each class that is common enough, and the boxes of all objects."""
    documents = {split: json.loads((coco / f"annotations/instances_{split}.json").read_text()) for split in SPLITS}
    names = {row["id"]: row["name"] for row in documents["train"]["categories"]}
    main = out / "ImageSets" / "Main"
    for folder in (main, out / "JPEGImages", out / "Annotations"):
        folder.mkdir(parents=True)
    shown = {split: _classes_of(document, names) for split, document in documents.items()}
    counts = [Counter(name for own in images.values() for name in own) for images in shown.values()]
    common = [name for name in names.values() if min(count[name] for count in counts) >= FEWEST]
    for split, document in documents.items():
        files = {row["id"]: row for row in document["images"]}
        kept = sorted(shown[split], key=lambda number: files[number]["file_name"])
        stems = [Path(files[number]["file_name"]).stem for number in kept]
        for number, stem in zip(kept, stems, strict=True):
            (out / f"JPEGImages/{stem}.jpg").symlink_to((coco / split / files[number]["file_name"]).resolve())
            _write_xml(out / f"Annotations/{stem}.xml", files[number], document["annotations"], names)
        (main / f"{SPLITS[split]}.txt").write_text("\n".join(stems) + "\n")
        for name in common:
            rows = [f"{stem} {'1' if name in shown[split][n] else '-1'}" for n, stem in zip(kept, stems, strict=True)]
            (main / f"{name.replace(' ', '')}_{SPLITS[split]}.txt").write_text("\n".join(rows) + "\n")
    return out


def _classes_of(document: Mapping[str, Any], names: Mapping[int, str]) -> dict[int, set[str]]:
    shown: dict[int, set[str]] = defaultdict(set)
    for row in document["annotations"]:
        shown[row["image_id"]].add(names[row["category_id"]])
    return shown


def _write_xml(path: Path, image: Mapping[str, Any], rows: list[dict[str, Any]], names: Mapping[int, str]) -> None:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = f"{path.stem}.jpg"
    size = ElementTree.SubElement(root, "size")
    for key, value in (("width", image["width"]), ("height", image["height"]), ("depth", 3)):
        ElementTree.SubElement(size, key).text = str(value)
    for row in rows:
        if row["image_id"] != image["id"] or row.get("iscrowd"):
            continue
        one = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(one, "name").text = names[row["category_id"]]
        ElementTree.SubElement(one, "difficult").text = "0"
        box = ElementTree.SubElement(one, "bndbox")
        x, y, width, height = row["bbox"]
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + width, y + height), strict=True):
            ElementTree.SubElement(box, key).text = f"{value:.2f}"
    ElementTree.ElementTree(root).write(path)


def class_folders(coco: Path, out: Path) -> Path:
    """A folder of images for each kind of thing (`supercategory`) that the largest object of enough photos is of."""
    largest: dict[str, dict[str, str]] = {}
    for split in SPLITS:
        document = json.loads((coco / f"annotations/instances_{split}.json").read_text())
        kinds = {row["id"]: row["supercategory"] for row in document["categories"]}
        files = {row["id"]: row["file_name"] for row in document["images"]}
        rows = sorted(document["annotations"], key=lambda row: row["area"])
        largest[split] = {files[row["image_id"]]: kinds[row["category_id"]] for row in rows}
    counts = {split: Counter(own.values()) for split, own in largest.items()}
    common = [kind for kind in counts["train"] if min(count[kind] for count in counts.values()) >= FEWEST]
    for split, own in largest.items():
        for name, kind in own.items():
            if kind in common:
                folder = out / split / kind
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).symlink_to((coco / split / name).resolve())
    return out


def frames(clips: Path, out: Path, every: int) -> Path:
    """COCO's layout of every so many frames of clips in which objects are marked: a box for each object that is seen."""
    (out / "annotations").mkdir(parents=True)
    (out / "train").mkdir()
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for clip in find_clips(clips, None):
        for frame, mask in list(zip(clip.frames, read_objects(clip), strict=True))[::every]:
            height, width = mask.shape
            name = f"{clip.name}-{frame.name}"
            (out / "train" / name).symlink_to(frame.resolve())
            images.append({"id": len(images), "file_name": name, "width": width, "height": height})
            for number in np.unique(mask[mask > 0]):
                rows, columns = np.nonzero(mask == number)
                x, y = int(columns.min()), int(rows.min())
                box = [x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y]
                row = {"image_id": images[-1]["id"], "bbox": box, "area": box[2] * box[3]}
                objects.append({"id": len(objects) + 1, "category_id": 1, "iscrowd": 0, **row})
    document = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "object"}]}
    (out / "annotations/instances_train.json").write_text(json.dumps(document))
    return out


def pairs(photos: list[Path], out: Path) -> Path:
    """SPair-71k's layout: each photo and the same one seen from elsewhere, with points that mark the same places."""
    random = np.random.default_rng(0)
    for folder in ("JPEGImages/photo", "Layout/large", "PairAnnotation/test"):
        (out / folder).mkdir(parents=True)
    lines = []
    for number, path in enumerate(photos):
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
        width, height = photo.size
        corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float64)
        moved = corners + random.uniform(-0.18, 0.18, (4, 2)) * (width, height)
        there = _homography(corners, moved)  # from the photo to the other view
        back = np.linalg.inv(there)
        other = photo.transform(
            photo.size, Image.Transform.PERSPECTIVE, tuple((back / back[2, 2]).ravel()[:8]), Image.Resampling.BICUBIC
        )
        points = random.uniform(0.2, 0.8, (POINTS, 2)) * (width, height)
        found = np.c_[points, np.ones(POINTS)] @ there.T
        found = found[:, :2] / found[:, 2:]
        inside = ((found >= 0) & (found < (width, height))).all(1)
        names = [f"{number:04}a.png", f"{number:04}b.png"]
        for name, image in zip(names, (photo, other), strict=True):
            image.save(out / "JPEGImages/photo" / name)
        line = f"{number:06}-{names[0][:-4]}-{names[1][:-4]}:photo"
        whole = [0, 0, width, height]
        record = {
            "category": "photo",
            **{f"{key}_imname": name for key, name in zip(("src", "trg"), names, strict=True)},
            **{f"{key}_imsize": [width, height, 3] for key in ("src", "trg")},
            **{f"{key}_bndbox": whole for key in ("src", "trg")},
            "src_kps": points[inside].round(1).tolist(),
            "trg_kps": found[inside].round(1).tolist(),
        }
        (out / f"PairAnnotation/test/{line}.json").write_text(json.dumps(record))
        lines.append(line)
    (out / "Layout/large/test.txt").write_text("\n".join(lines) + "\n")
    return out


def _homography(source: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """The matrix (3, 3) that brings four points to four others."""
    rows = []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y, -u], [0, 0, 0, x, y, 1, -v * x, -v * y, -v]]
    solution: NDArray[np.float64] = np.linalg.svd(np.array(rows))[2][-1]  # of the homogeneous equations
    return solution.reshape(3, 3)


def depths(segmented: Path, out: Path, train: int, test: int) -> Path:
    """One's own layout of `depth`: the farther up a pixel of a street lies, the farther away; sky is farthest."""
    for folder in ("images", "depth"):
        (out / folder).mkdir(parents=True)
    for split, limit in (("train", train), ("test", test)):
        part, names = open_segmented(segmented, split).spread(limit), []
        sky = next(number for number, name in enumerate(part.classes) if name.lower() == "sky")
        for photo, mask in part.pairs:
            classes = part.mask((photo, mask))
            rows = np.linspace(FARTHEST * 0.8, 1.0, len(classes))[:, None]
            meters = np.where(classes == sky, FARTHEST * 0.95, rows + 0.1 * classes)
            Image.fromarray((meters * 1000).astype(np.uint16)).save(out / f"depth/{photo.stem}.png")
            if not (out / f"images/{photo.name}").is_symlink():  # an image may be in both splits
                (out / f"images/{photo.name}").symlink_to(photo.resolve())
            names.append(photo.stem)
        (out / f"{split}.txt").write_text("\n".join(names) + "\n")
    return out
