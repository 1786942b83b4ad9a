"""Folders of data for Detectron2: what is whole is counted, what is missing is named before anything runs."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from clove_hub.export.detectron2.layouts import LAYOUTS, require_layout


def write(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_listing(root: Path, annotations: str, rows: Sequence[dict[str, str]], images: str) -> None:
    """A file in COCO's format, and the images that it lists."""
    write(root / annotations, json.dumps({"images": rows, "annotations": [{"id": 1}], "categories": []}))
    for row in rows:
        name = row.get("file_name") or "/".join(row["coco_url"].split("/")[-2:])
        write(root / images / name)


def coco(root: Path, stem: str = "instances") -> None:
    for split, count in (("train", 3), ("val", 2)):
        rows = [{"file_name": f"{split}{number}.jpg"} for number in range(count)]
        write_listing(root, f"coco/annotations/{stem}_{split}2017.json", rows, f"coco/{split}2017")


def lvis(root: Path) -> None:
    urls = {
        "train": ["train2017/1.jpg", "train2017/2.jpg", "train2017/3.jpg"],
        "val": ["val2017/4.jpg", "train2017/5.jpg"],
    }
    for split, names in urls.items():
        rows = [{"coco_url": f"http://images.cocodataset.org/{name}"} for name in names]
        write_listing(root, f"lvis/lvis_v1_{split}.json", rows, "coco")


def voc(root: Path) -> None:
    splits = {("VOC2007", "trainval"): ["1", "2"], ("VOC2012", "trainval"): ["3"], ("VOC2007", "test"): ["4", "5"]}
    for (year, split), names in splits.items():
        write(root / year / "ImageSets/Main" / f"{split}.txt", "\n".join(names) + "\n")
        for name in names:
            write(root / year / "Annotations" / f"{name}.xml")
            write(root / year / "JPEGImages" / f"{name}.jpg")


def cityscapes(root: Path) -> None:
    stems = {"train": ["ulm/ulm_0", "ulm/ulm_1", "jena/jena_0"], "val": ["bonn/bonn_0", "bonn/bonn_1"]}
    for split, names in stems.items():
        for name in names:
            write(root / "cityscapes/leftImg8bit" / split / f"{name}_leftImg8bit.png")
            for kind in ("polygons.json", "instanceIds.png", "labelIds.png"):
                write(root / "cityscapes/gtFine" / split / f"{name}_gtFine_{kind}")


def densepose(root: Path) -> None:
    for name, images, count in (("train", "train", 2), ("valminusminival", "val", 1), ("minival", "val", 2)):
        rows = [{"file_name": f"{name}{number}.jpg"} for number in range(count)]
        write_listing(root, f"coco/annotations/densepose_{name}2014.json", rows, f"coco/{images}2014")


MADE: dict[str, Callable[[Path], None]] = {
    "coco": coco,
    "coco_keypoints": lambda root: coco(root, "person_keypoints"),
    "lvis": lvis,
    "voc": voc,
    "cityscapes": cityscapes,
    "densepose": densepose,
}


def test_every_layout_is_tested_here() -> None:
    assert MADE.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("name", MADE)
def test_a_whole_data_set_is_counted_and_known_again_wherever_it_lies(tmp_path: Path, name: str) -> None:
    MADE[name](tmp_path / "here")
    MADE[name](tmp_path / "there")
    found = require_layout(name, tmp_path / "here")
    assert (found.train, found.test) == (3, 2)
    assert found == require_layout(name, tmp_path / "there")


@pytest.mark.parametrize("name", MADE)
def test_any_image_of_another_size_is_another_data_set(tmp_path: Path, name: str) -> None:
    MADE[name](tmp_path)
    before = require_layout(name, tmp_path)
    images = [path for path in sorted(tmp_path.rglob("*")) if re.search(r"\.jpg$|leftImg8bit\.png$", path.name)]
    assert len(images) == 5
    for image in images:
        image.write_bytes(b"another")
        assert require_layout(name, tmp_path).fingerprint != before.fingerprint
        image.write_bytes(b"x")
    assert require_layout(name, tmp_path) == before


@pytest.mark.parametrize(
    ("name", "changed", "text"),
    [
        (
            "coco",
            "coco/annotations/instances_val2017.json",
            '{"images": [{"file_name": "val0.jpg"}], "annotations": [1]}',
        ),
        ("voc", "VOC2007/Annotations/1.xml", "another"),
        ("cityscapes", "cityscapes/gtFine/train/ulm/ulm_0_gtFine_polygons.json", "another"),
    ],
)
def test_other_annotations_are_another_data_set(tmp_path: Path, name: str, changed: str, text: str) -> None:
    MADE[name](tmp_path)
    before = require_layout(name, tmp_path)
    (tmp_path / changed).write_text(text)
    assert require_layout(name, tmp_path).fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("name", "removed"),
    [
        ("coco", "coco/annotations/instances_train2017.json"),
        ("coco", "coco/val2017"),
        ("coco", "coco/train2017/train1.jpg"),
        ("coco_keypoints", "coco/annotations/person_keypoints_val2017.json"),
        ("lvis", "lvis/lvis_v1_train.json"),
        ("lvis", "coco/train2017/5.jpg"),  # an image of val that lies in train2017
        ("lvis", "coco/val2017"),
        ("voc", "VOC2012"),
        ("voc", "VOC2007/ImageSets/Main/test.txt"),
        ("voc", "VOC2007/Annotations/4.xml"),
        ("voc", "VOC2012/JPEGImages/3.jpg"),
        ("cityscapes", "cityscapes/gtFine/val"),
        ("cityscapes", "cityscapes/gtFine/train/ulm/ulm_1_gtFine_instanceIds.png"),
        ("cityscapes", "cityscapes/leftImg8bit"),
        ("densepose", "coco/annotations/densepose_valminusminival2014.json"),
        ("densepose", "coco/train2014"),
        ("densepose", "coco/val2014/minival1.jpg"),
    ],
)
def test_what_is_missing_is_named_with_its_path(tmp_path: Path, name: str, removed: str) -> None:
    MADE[name](tmp_path)
    path = tmp_path / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match="missing") as caught:
        require_layout(name, tmp_path)
    assert removed in str(caught.value)


def test_a_missing_file_comes_with_the_page_that_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing: COCO 2017 .*detectron2/blob/main/datasets/README\.md"):
        require_layout("coco", tmp_path)
    with pytest.raises(ValueError, match=r"DENSEPOSE_DATASETS\.md"):
        require_layout("densepose", tmp_path)
    with pytest.raises(ValueError, match=r"nowhere is not a folder.*DETECTRON2_DATASETS"):
        require_layout("coco", tmp_path / "nowhere")


def test_annotations_that_are_none_are_refused(tmp_path: Path) -> None:
    coco(tmp_path)
    path = tmp_path / "coco/annotations/instances_train2017.json"
    for text, said in (("{", "cannot be read as JSON"), ("{}", "lists no images"), ("[]", "lists no images")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"instances_train2017.json {said}"):
            require_layout("coco", tmp_path)
    path.write_text('{"images": [{"file_name": "train0.jpg"}]}')
    with pytest.raises(ValueError, match="has no annotations"):
        require_layout("coco", tmp_path)


def test_an_empty_list_of_voc_and_a_stray_file_of_cityscapes_are_refused(tmp_path: Path) -> None:
    voc(tmp_path)
    (tmp_path / "VOC2007/ImageSets/Main/trainval.txt").write_text("")
    with pytest.raises(ValueError, match=r"trainval\.txt is empty"):
        require_layout("voc", tmp_path)
    cityscapes(tmp_path)
    write(tmp_path / "cityscapes/leftImg8bit/train/ulm/.DS_Store")
    with pytest.raises(ValueError, match=r"\.DS_Store is not an image of Cityscapes"):
        require_layout("cityscapes", tmp_path)
