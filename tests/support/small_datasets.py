"""A few real photos in the layout of each data set that Detectron2's tasks are trained on, with what their truth needs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import SHARED
from PIL import Image, ImageDraw

SOURCE = SHARED / "data" / "detection"
COUNTS = {"train": 8, "val": 3}


def small_dataset(layout: str, root: Path) -> Path:
    """Writes it below `root`; skips the test where the photos are not at hand.

    Args:
        layout: one of `detectron2.layouts.LAYOUTS`.
    """
    if not SOURCE.is_dir():
        pytest.skip(f"the photos are not at hand ({SOURCE})")
    {
        "coco": _coco,
        "coco_keypoints": _keypoints,
        "lvis": _lvis,
        "voc": _voc,
        "cityscapes": _cityscapes,
        "densepose": _densepose,
    }[layout](root)
    return root


def _document(split: str, kind: str = "instances", only: set[int] | None = None) -> dict[str, Any]:
    """A few images, each with an object that counts."""
    document: dict[str, Any] = json.loads((SOURCE / "annotations" / f"{kind}_{split}.json").read_text())
    usable = [
        annotation
        for annotation in document["annotations"]
        if not annotation.get("iscrowd") and (only is None or annotation["category_id"] in only)
        if kind == "instances" or annotation["num_keypoints"] > 4
    ]
    if only is not None:
        document["annotations"] = usable
    shown = {annotation["image_id"] for annotation in usable}
    document["images"] = [image for image in document["images"] if image["id"] in shown][: COUNTS[split]]
    kept = {image["id"] for image in document["images"]}
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] in kept]
    return document


def _put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_symlink():
        path.symlink_to(target)


# ---- COCO, LVIS, DensePose -------------------------------------------------------------------------------------------


def _coco(root: Path, kind: str = "instances") -> None:
    for split in COUNTS:
        _put(root / f"coco/annotations/{kind}_{split}2017.json", json.dumps(_document(split, kind)))
        _link(root / f"coco/{split}2017", SOURCE / split)


def _keypoints(root: Path) -> None:
    _coco(root, "person_keypoints")


def _lvis(root: Path) -> None:
    """COCO's classes under those LVIS names that are the same; some images of val lie in train2017, as in LVIS."""
    from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

    numbers = {category["name"]: category["id"] for category in LVIS_CATEGORIES}
    for split in COUNTS:
        document = _document(split)
        names = {category["id"]: category["name"].replace(" ", "_") for category in document["categories"]}
        annotations = [a for a in document["annotations"] if names[a["category_id"]] in numbers and not a["iscrowd"]]
        for annotation in annotations:
            annotation["category_id"] = numbers[names[annotation["category_id"]]]
            del annotation["iscrowd"]
        images = []
        for image in document["images"]:
            present = {a["category_id"] for a in annotations if a["image_id"] == image["id"]}
            lists = {"neg_category_ids": sorted({1, 2} - present), "not_exhaustive_category_ids": []}
            folder = f"{split}2017"
            row = {key: image[key] for key in ("id", "height", "width")} | lists
            images.append(row | {"coco_url": f"http://images.cocodataset.org/{folder}/{image['file_name']}"})
        categories = [{"image_count": 1, "instance_count": 1} | category for category in LVIS_CATEGORIES]
        rows = {"images": images, "annotations": annotations, "categories": categories}
        _put(root / f"lvis/lvis_v1_{split}.json", json.dumps(rows))
        _link(root / f"coco/{split}2017", SOURCE / split)


def _densepose(root: Path) -> None:
    """People with points on their surface; what the points say is made up."""
    from pycocotools import mask

    rng = np.random.default_rng(0)
    for name, split, images in (
        ("train", "train", "train"),
        ("valminusminival", "val", "val"),
        ("minival", "val", "val"),
    ):
        document = _document(split, only={1})
        document["categories"] = [{"id": 1, "name": "person", "supercategory": "person"}]
        for annotation in document["annotations"]:
            count = 40
            whole = mask.encode(np.asfortranarray(np.ones((256, 256), np.uint8)))
            whole["counts"] = whole["counts"].decode()
            points = {axis: rng.uniform(20, 235, count).tolist() for axis in ("dp_x", "dp_y")}
            surface = {axis: rng.uniform(0, 1, count).tolist() for axis in ("dp_U", "dp_V")}
            parts = rng.integers(1, 25, count).astype(float).tolist()
            annotation |= points | surface | {"dp_I": parts, "dp_masks": [whole, *[[]] * 13]}
        _put(root / f"coco/annotations/densepose_{name}2014.json", json.dumps(document))
        _link(root / f"coco/{images}2014", SOURCE / split)


def densepose_files(cache: Path) -> None:
    """The four files of DensePose in the form that its code reads, of a made surface of 240 points."""
    from scipy.io import savemat

    folder = cache / "densepose" / "data"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    points, parts = 240, np.repeat(np.arange(1, 25), 10)
    maps = np.empty((1, 24), object)
    for part in range(24):
        maps[0, part] = rng.uniform(0, 1, (256, 256))
    savemat(folder / "UV_symmetry_transforms.mat", {"U_transforms": maps, "V_transforms": maps})
    surface = {name: rng.uniform(0, 1, (points, 1)) for name in ("U_subdiv", "V_subdiv")}
    savemat(folder / "SMPL_subdiv.mat", surface | {"Part_ID_subdiv": parts[:, None]})
    savemat(folder / "SMPL_SUBDIV_TRANSFORM.mat", {"index": np.arange(1, points + 1)[:, None]})
    distances = rng.uniform(0.01, 1, (points * (points - 1) // 2, 1)).astype(np.float32)
    (folder / "Pdist_matrix.pkl").write_bytes(pickle.dumps({"Pdist_matrix": distances}))


# ---- PASCAL VOC ------------------------------------------------------------------------------------------------------

VOC_NAMES = {"airplane": "aeroplane", "motorcycle": "motorbike", "couch": "sofa", "tv": "tvmonitor"} | {
    "potted plant": "pottedplant",
    "dining table": "diningtable",
}
VOC = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]


def _voc(root: Path) -> None:
    for year, split, ours in (
        ("VOC2007", "trainval", "train"),
        ("VOC2012", "trainval", "train"),
        ("VOC2007", "test", "val"),
    ):
        document = _document(ours)
        names = {c["id"]: VOC_NAMES.get(c["name"], c["name"]) for c in document["categories"]}
        known = {number for number, name in names.items() if name in VOC}
        document = _document(ours, only=known)
        stems = []
        for image in document["images"]:
            stem = f"{year}_{split}_{image['id']}"
            stems.append(stem)
            tree = ElementTree.Element("annotation")
            size = ElementTree.SubElement(tree, "size")
            for key, value in (("width", image["width"]), ("height", image["height"]), ("depth", 3)):
                ElementTree.SubElement(size, key).text = str(value)
            for annotation in document["annotations"]:
                if annotation["image_id"] != image["id"]:
                    continue
                node = ElementTree.SubElement(tree, "object")
                own = {
                    "name": names[annotation["category_id"]],
                    "pose": "Unspecified",
                    "truncated": "0",
                    "difficult": "0",
                }
                for key, text in own.items():
                    ElementTree.SubElement(node, key).text = text
                x, y, width, height = annotation["bbox"]
                box = ElementTree.SubElement(node, "bndbox")
                corners = (x + 1, y + 1, x + width, y + height)
                for key, corner in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
                    ElementTree.SubElement(box, key).text = str(round(corner))
            _put(root / year / "Annotations" / f"{stem}.xml", ElementTree.tostring(tree))
            _link(root / year / "JPEGImages" / f"{stem}.jpg", SOURCE / ours / image["file_name"])
        _put(root / year / "ImageSets/Main" / f"{split}.txt", "\n".join(stems) + "\n")


# ---- Cityscapes ------------------------------------------------------------------------------------------------------

CITY = {1: ("person", 24), 2: ("bicycle", 33), 3: ("car", 26), 4: ("motorcycle", 32), 6: ("bus", 28), 8: ("truck", 27)}


def _cityscapes(root: Path) -> None:
    for split in COUNTS:
        document = _document(split, only=set(CITY))
        for number, image in enumerate(document["images"]):
            stem = f"ulm_{number:06d}_000019"
            shape = (image["width"], image["height"])
            instances, labels = Image.new("I;16", shape), Image.new("L", shape)
            objects = []
            mine = [a for a in document["annotations"] if a["image_id"] == image["id"]]
            for place, annotation in enumerate(mine):
                if not isinstance(annotation["segmentation"], list):
                    continue
                name, label = CITY[annotation["category_id"]]
                points = np.reshape(annotation["segmentation"][0], (-1, 2)).round().astype(int)
                corners = [tuple(point) for point in points.tolist()]
                ImageDraw.Draw(instances).polygon(corners, fill=label * 1000 + place)
                ImageDraw.Draw(labels).polygon(corners, fill=label)
                objects.append({"label": name, "polygon": [list(point) for point in corners]})
            truth = root / "cityscapes/gtFine" / split / "ulm"
            rows = {"imgHeight": image["height"], "imgWidth": image["width"], "objects": objects}
            _put(truth / f"{stem}_gtFine_polygons.json", json.dumps(rows))
            instances.save(truth / f"{stem}_gtFine_instanceIds.png")
            labels.save(truth / f"{stem}_gtFine_labelIds.png")
            photo = root / "cityscapes/leftImg8bit" / split / "ulm" / f"{stem}_leftImg8bit.png"
            photo.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(SOURCE / split / image["file_name"]) as original:
                original.convert("RGB").save(photo)
