"""COCO's format, as its exporters write it: what has one meaning is read, everything else is refused by its name."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import perfect
import pytest
from conftest import SHARED
from fine_tuning import put

from clove_hub.data import coco, voc
from clove_hub.data.coco_document import _runs, read_document

pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install 'clove-hub[downstream]'")
pytest_plugins = ["downstream_fixtures"]


# ---- what is refused and what is left out ----------------------------------------------------------------------------


def test_what_cannot_be_learned_is_dropped_and_counted(made, caplog):
    folder, document = made
    first, second, third, fourth = document["annotations"]
    first["bbox"] = [3, 3, 0, 5]
    second["segmentation"] = [[1, 2, 3, 4]]
    third["segmentation"].append([1, 2, 3, 4, 5, 6, 7])
    fourth["iscrowd"] = 1
    put(folder, document)
    split = coco.read_split(folder, "train", "instances")
    assert [len(photo.boxes) for photo in split.photos] == [0, 1]
    assert len(coco.trainable(split, "instances")) == 1
    for said in (
        "1 annotations have a box that covers nothing of the image and are left out (ids 11)",
        "1 annotations have no polygon with three corners or more and are left out (ids 14)",
        "1 annotations lose a polygon with fewer than three corners or an odd number of coordinates (ids 21)",
        "1 of 2 images have no usable instance",
    ):
        assert said in caplog.text


def test_boxes_are_clipped_and_categories_numbered_from_one(made):
    folder, document = made
    document["categories"].insert(0, {"id": 90, "name": "dog"})
    document["annotations"][0] |= {"bbox": [-5, 40, 20, 20], "category_id": 90}
    put(folder, document)
    split = coco.read_split(folder, "train", "detection")
    assert [category.id for category in split.categories] == [7, 90]
    assert split.photos[0].boxes[0].tolist() == [0, 40, 15, 48]
    assert split.photos[0].labels.tolist() == [2, 1]


def test_the_fingerprint_follows_the_annotations_and_the_sizes_of_the_images(made, tmp_path_factory):
    folder, document = made
    put(folder, document)
    first = coco.read_split(folder, "train", "detection").fingerprint
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "coco"
    shutil.copytree(folder, elsewhere)
    assert coco.read_split(elsewhere, "train", "detection").fingerprint == first
    photo = elsewhere / "train" / "2.jpg"
    photo.write_bytes(photo.read_bytes() + b"x")
    assert coco.read_split(elsewhere, "train", "detection").fingerprint != first
    put(folder, document | {"info": {"year": 2017}})
    assert coco.read_split(folder, "train", "detection").fingerprint != first


def broken(document: dict, key: str) -> None:
    annotation = document["annotations"][0]
    changes = {
        "bbox of three": lambda: annotation.update(bbox=[1, 2, 3]),
        "bbox of words": lambda: annotation.update(bbox=[1, 2, 3, "four"]),
        "no bbox": lambda: annotation.pop("bbox"),
        "unknown image": lambda: annotation.update(image_id=99),
        "unknown category": lambda: annotation.update(category_id=99),
        "no id": lambda: annotation.pop("id"),
        "no segmentation": lambda: annotation.pop("segmentation"),
        "polygon of words": lambda: annotation.update(segmentation=[["a", 2, 3, 4, 5, 6]]),
        "rle of another size": lambda: annotation.update(segmentation={"size": [4, 4], "counts": [16]}),
        "two of an id": lambda: document["images"].append(document["images"][0]),
        "no height": lambda: document["images"][0].pop("height"),
        "no categories": lambda: document.update(categories=[]),
        "no annotations": lambda: document.update(annotations=[]),
        "no list": lambda: document.pop("annotations"),
        "image absent": lambda: document["images"][0].update(file_name="gone.jpg"),
        "no keypoints": lambda: annotation.pop("keypoints"),
        "too few keypoints": lambda: annotation.update(keypoints=[1, 2, 2]),
        "no names of keypoints": lambda: document["categories"][0].pop("keypoints"),
        "other keypoints": lambda: document["categories"][0].update(keypoints=["a", "b"]),
    }
    changes[key]()


@pytest.mark.parametrize(
    ("key", "task", "message"),
    [
        ("bbox of three", "detection", r"annotation 11 has the bbox \[1, 2, 3\]"),
        ("bbox of words", "detection", "annotation 11 has the bbox"),
        ("no bbox", "detection", "annotation 11 has the bbox None"),
        ("unknown image", "detection", "annotation 11 belongs to image 99"),
        ("unknown category", "detection", "annotation 11 is of category 99"),
        ("no id", "detection", "an annotation of image 1 has no integer id"),
        ("no segmentation", "instances", "annotation 11 has the segmentation 'None'"),
        ("polygon of words", "instances", "annotation 11 has the segmentation"),
        ("rle of another size", "instances", r"annotation 11 has a mask in RLE of size \[4, 4\]"),
        ("two of an id", "detection", "two images have the id 1"),
        ("no height", "detection", "image 1 .* has height None"),
        ("no categories", "detection", "it has no categories"),
        ("no annotations", "detection", "has no annotations"),
        ("no list", "detection", "has no list of annotations"),
        ("image absent", "detection", "lacks 1 of the 2 images .*gone.jpg"),
        ("no keypoints", "keypoints", "annotation 11 has no keypoints"),
        ("too few keypoints", "keypoints", "annotation 11 has keypoints that are not 3 x 17"),
        ("no names of keypoints", "keypoints", "keypoints need exactly one"),
        ("other keypoints", "keypoints", "cat has 2 keypoints"),
    ],
)
def test_contradictions_are_named_with_file_and_annotation(key, task, message, made):
    folder, document = made
    broken(document, key)
    put(folder, document)
    with pytest.raises(ValueError, match=message) as caught:
        coco.read_split(folder, "train", task)
    assert str(folder) in str(caught.value)


# ---- what exporters write --------------------------------------------------------------------------------------------


def rectangle(x: float, y: float, w: float, h: float) -> list[float]:
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def points_as_floats(a: dict) -> None:
    a["keypoints"] = [float(value) for value in a["keypoints"]]
    a["keypoints"][:3] = [None, float("nan"), 0]
    a.pop("num_keypoints")


FORMS = {
    "sizes as floats and text": lambda d: [i.update(height=48.0, width="64") for i in d["images"]],
    "ids as text": lambda d: [
        *(i.update(id=str(i["id"])) for i in d["images"]),
        *(a.update(id=str(a["id"]), image_id=str(a["image_id"]), category_id="7") for a in d["annotations"]),
    ],
    "ids as text in one place": lambda d: [a.update(image_id=f"{a['image_id']}.0") for a in d["annotations"]],
    "ids as floats": lambda d: [a.update(image_id=float(a["image_id"]), category_id=7.0) for a in d["annotations"]],
    "ids as words": lambda d: [
        *(i.update(id=f"image {i['id']}") for i in d["images"]),
        *(a.update(image_id=f"image {a['image_id']}") for a in d["annotations"]),
    ],
    "an annotation 0": lambda d: [a.update(id=number) for number, a in enumerate(d["annotations"])],
    "one id for all annotations": lambda d: [a.update(id=5) for a in d["annotations"]],
    "a category 0": lambda d: [d["categories"][0].update(id=0), *(a.update(category_id=0) for a in d["annotations"])],
    "boxes as text": lambda d: [a.update(bbox=[str(v) for v in a["bbox"]]) for a in d["annotations"]],
    "boxes beyond the image": lambda d: [
        a.update(bbox=box, segmentation=[rectangle(*box)])
        for a, box in zip(d["annotations"], ([-5, 6, 20, 16], [40, 6, 90, 16]), strict=False)
    ],
    "no area": lambda d: [a.pop("area") for a in d["annotations"]],
    "areas of nothing": lambda d: [a.update(area=v) for a, v in zip(d["annotations"], (0, None, -3, "x"), strict=True)],
    "areas that are not numbers": lambda d: [a.update(area=float("nan")) for a in d["annotations"]],
    "areas of the image": lambda d: [a.update(area=64 * 48 * 10) for a in d["annotations"]],
    "no iscrowd": lambda d: [a.pop("iscrowd") for a in d["annotations"]],
    "iscrowd of all kinds": lambda d: [
        a.update(iscrowd=v) for a, v in zip(d["annotations"], (False, "0", None, 0.0), strict=True)
    ],
    "a crowd": lambda d: d["annotations"][0].update(
        iscrowd=True, segmentation={"size": [48, 64], "counts": [0, 48 * 64]}
    ),
    "a crowd as text": lambda d: d["annotations"][0].update(iscrowd="1"),
    "one to ignore": lambda d: d["annotations"][0].update(ignore=1),
    "a box without size": lambda d: d["annotations"][0].update(bbox=[9, 9, 0, 0]),
    "a negative box": lambda d: d["annotations"][0].update(bbox=[30, 22, -20, -16]),
    "a flat polygon": lambda d: [a.update(segmentation=a["segmentation"][0]) for a in d["annotations"]],
    "polygons of pairs": lambda d: [
        a.update(segmentation=[np.reshape(a["segmentation"][0], (-1, 2)).tolist()]) for a in d["annotations"]
    ],
    "a polygon of a box": lambda d: d["annotations"][0].update(segmentation=[[8, 6, 28, 22]]),
    "an odd polygon more": lambda d: d["annotations"][0]["segmentation"].append([1, 2, 3, 4, 5, 6, 7]),
    "polygons twice": lambda d: [a["segmentation"].append(a["segmentation"][0]) for a in d["annotations"]],
    "no polygon": lambda d: d["annotations"][0].update(segmentation=[]),
    "a polygon outside": lambda d: d["annotations"][0].update(segmentation=[rectangle(70, 50, 9, 9)]),
    "a polygon too thin": lambda d: d["annotations"][0].update(segmentation=[rectangle(8, 6, 0.01, 9)]),
    "rle as a list": lambda d: d["annotations"][0].update(
        segmentation={"size": ["48", 64.0], "counts": [48 * 8 + 6, 16, 32, 16, "32", 16.0, 48 * 64 - 48 * 8 - 118]}
    ),
    "keypoints as floats": lambda d: [points_as_floats(a) for a in d["annotations"]],
    "keypoints miscounted": lambda d: [a.update(num_keypoints=0) for a in d["annotations"]],
    "nobody with keypoints": lambda d: d["annotations"][0].update(keypoints=[0] * 51, num_keypoints=17),
    "a broken skeleton": lambda d: d["categories"][0].update(skeleton=[[1], "x", [1, 99], [2, 1]]),
    "images without annotations": lambda d: d.update(annotations=d["annotations"][:2]),
    "images in another order": lambda d: d["images"].reverse(),
    "folders before names": lambda d: [i.update(file_name=f"C:\\data\\train\\{i['file_name']}") for i in d["images"]],
    "paths of label studio": lambda d: [
        i.update(file_name=f"..\\..\\label-studio\\media\\upload\\4\\{i['file_name']}") for i in d["images"]
    ],
    "addresses": lambda d: [i.update(file_name=f"https://a.b/c%20d/{i['file_name']}?x=1/2") for i in d["images"]],
    "absolute paths": lambda d: [i.update(file_name=f"/home/me/x/{i['file_name']}") for i in d["images"]],
    "a parent category that nothing uses": lambda d: [
        d["categories"].insert(0, {"id": 0, "name": "cat", "supercategory": "none"}),
        d["categories"][1].update(supercategory="cat"),
    ],
    "licenses and info": lambda d: d.update(info=None, licenses="none", type="instances"),
}


@pytest.mark.parametrize("task", ["detection", "instances", "keypoints"])
@pytest.mark.parametrize("form", FORMS)
def test_who_finds_what_is_there_has_an_ap_of_100_whoever_wrote_the_file(form, task, made):
    folder, document = made
    FORMS[form](document)
    put(folder, document)
    split = coco.read_split(folder, "val", task)
    found = perfect.results(split)
    assert len(found) >= 2
    for kind in {"detection": ["bbox"], "instances": ["bbox", "segm"], "keypoints": ["bbox", "keypoints"]}[task]:
        rows = found
        if kind == "bbox" and task == "keypoints":
            rows = perfect.results(coco.read_split(folder, "val", "detection"))
        for library in ("pycocotools", "faster_coco_eval"):
            if library == "faster_coco_eval" and not FASTER:
                continue
            figures = perfect.average_precisions(split.truth, rows, kind, library)
            assert figures[0] == pytest.approx(1, abs=1e-9), (kind, library)
            assert all(value == pytest.approx(1, abs=1e-9) for value in figures if value >= 0)


def test_what_is_trained_on_can_be_scored(made):
    folder, document = made
    put(folder, document)
    train, scored = voc.read_splits(folder, "detection", "train", "train")
    assert train.truth == {}
    rows = perfect.results(scored)
    assert perfect.average_precisions(scored.truth, rows, "bbox", "pycocotools")[0] == pytest.approx(1, abs=1e-9)


try:
    import faster_coco_eval

    FASTER = bool(faster_coco_eval)
except ImportError:
    FASTER = False


def test_a_document_of_before_the_repairs_would_be_scored_wrong(made):
    """The reason for numbering anew: an annotation 0 is taken for no match, of equal ids the last counts alone."""
    folder, document = made
    for number, annotation in enumerate(document["annotations"]):
        annotation["id"] = number
    put(folder, document)
    split = coco.read_split(folder, "val", "detection")
    raw = document | {"info": {}}
    assert perfect.average_precisions(raw, perfect.results(split), "bbox", "pycocotools")[0] < 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: [a.update(bbox=[a["bbox"][0], 6, a["bbox"][0] + 20, 22]) for a in d["annotations"]],
            r"of 4 boxes leave their image as \[x, y, width, height\] and fit it as \[x0, y0, x1, y1\]",
        ),
        (
            lambda d: [a.update(bbox=[2, 3, 12, 13], area=100) for a in d["annotations"]],  # they do not leave it
            "4 of 4 boxes",
        ),
        (lambda d: [a.update(bbox=[0.1, 0.2, 0.3, 0.4]) for a in d["annotations"]], "as if they were fractions"),
        (
            lambda d: [a.update(bbox=[4 * v for v in a["bbox"]]) for a in d["annotations"]],
            "4 of 4 boxes leave their image, as if made for images of another size",
        ),
        (
            lambda d: [a.update(segmentation=[[v / 64 for v in a["segmentation"][0]]]) for a in d["annotations"]],
            "4 of 4 polygons do not fit their boxes",
        ),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), "annotation 11 has the bbox"),
        (lambda d: d["annotations"][0].update(iscrowd=2), "annotation 11 has iscrowd 2; expected 0 or 1"),
        (
            lambda d: d["annotations"][0].update(segmentation={"size": [48, 64], "counts": [5, 5]}),
            "annotation 11 has a mask in RLE whose counts do not add up to the 3072 pixels",
        ),
        (
            lambda d: d["annotations"][0].update(segmentation={"size": [48, 64], "counts": "garbage\t"}),
            "annotation 11 has a mask in RLE whose counts do not add up",
        ),
        (
            lambda d: d["categories"].append({"id": 8, "name": " cat"}),
            "the categories 7 and 8 are both named 'cat'",
        ),
        (lambda d: d["images"][1].update(file_name="x/1.jpg"), r"lists 1 images more than once, such as 1\.jpg"),
        (lambda d: d["images"][1].update(id="1"), "two images have the id 1"),
        (lambda d: d["categories"][0].update(name=None), "lacks an integer id or a name"),
        (lambda d: d.update(images={}), "has no list of images"),
    ],
)
def test_what_has_two_meanings_is_refused(change, message, made):
    folder, document = made
    change(document)
    put(folder, document)
    with pytest.raises(ValueError, match=message) as caught:
        coco.read_split(folder, "train", "instances")
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "the file is empty"), (b"[]", "has no list of images"), (b"{", "JSON")]
)
def test_what_is_no_document_is_refused(content, message, made):
    folder, _ = made
    (folder / "annotations" / "instances_train.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        coco.read_split(folder, "train", "detection")


def test_a_byte_order_mark_is_no_obstacle(made):
    folder, document = made
    for encoding in ("utf-8-sig", "utf-16"):
        (folder / "annotations" / "instances_train.json").write_text(json.dumps(document), encoding=encoding)
        assert len(coco.read_split(folder, "train", "detection").photos) == 2


def test_areas_of_boxes_beside_polygons_are_those_of_the_polygons(made, caplog):
    """APs, APm and APl sort by the mask's area; some exporters give that of the box."""
    folder, document = made
    first = document["annotations"][0]
    first |= {"segmentation": [[8, 6, 28, 6, 8, 22]], "area": 320}
    put(folder, document)
    document["annotations"][1]["area"], document["annotations"][2]["area"] = 0, 64 * 48
    put(folder, document)
    areas = [row["area"] for row in coco.read_split(folder, "val", "detection").truth["annotations"]]
    assert areas == [160, 320, 320, 320]
    assert "1 annotations have the area of their box, and get that of their polygons (ids 11)" in caplog.text


def test_annotations_that_repeat_another_one_are_counted(made, caplog):
    folder, document = made
    document["annotations"].append(document["annotations"][0] | {"id": 99})
    put(folder, document)
    assert len(coco.read_split(folder, "train", "detection").photos[0].boxes) == 3
    assert "1 annotations repeat image, category and box of another one" in caplog.text


def test_a_validation_split_of_crowds_alone_has_nothing_to_score(made):
    folder, document = made
    for annotation in document["annotations"]:
        annotation["iscrowd"] = 1
    put(folder, document)
    with pytest.raises(ValueError, match="there is nothing to score"):
        coco.read_split(folder, "val", "detection")


def test_images_behind_a_link_to_a_folder_are_found(made, tmp_path_factory):
    folder, document = made
    other = tmp_path_factory.mktemp("disk")
    (folder / "train" / "1.jpg").rename(other / "1.jpg")
    (folder / "train" / "disk").symlink_to(other)
    document["images"][0]["file_name"] = "disk/1.jpg"
    put(folder, document)
    assert coco.read_split(folder, "train", "detection").photos[0].path == folder / "train" / "disk" / "1.jpg"


def test_what_is_a_crowd_or_ignored_is_not_learned(made):
    folder, document = made
    document["annotations"][0]["iscrowd"], document["annotations"][1]["ignore"] = "1", 1
    put(folder, document)
    assert [len(photo.boxes) for photo in coco.read_split(folder, "train", "detection").photos] == [0, 2]
    assert [row["iscrowd"] for row in coco.read_split(folder, "val", "detection").truth["annotations"]] == [1, 1, 0, 0]


def test_compressed_rle_is_counted_as_pycocotools_counts_it(made):
    from pycocotools import mask

    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        pixels = np.asfortranarray((rng.random((48, 64)) < share).astype(np.uint8))
        rle = mask.encode(pixels)
        runs = np.diff(np.flatnonzero(np.diff(pixels.ravel("F"), prepend=2, append=2)))
        assert _runs(rle["counts"].decode()) == [*([0] if pixels[0, 0] else []), *runs.tolist()]
    folder, document = made
    document["annotations"][0]["segmentation"] = {
        "size": [48, 64],
        "counts": str(mask.encode(pixels)["counts"]),
    }  # b'...'
    put(folder, document)
    shape = coco.read_split(folder, "train", "instances").photos[0].segmentations[0]
    assert mask.area(shape) == 48 * 64


# ---- layouts ---------------------------------------------------------------------------------------------------------


def test_the_layout_of_roboflow(made):
    folder, document = made
    (folder / "val").rename(folder / "valid")
    shutil.rmtree(folder / "annotations")
    document["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})
    document["categories"][1] |= {"id": 1, "supercategory": "animals"}
    for annotation in document["annotations"]:
        annotation |= {"category_id": 1, "segmentation": []}
    for name in ("train", "valid"):
        (folder / name / "_annotations.coco.json").write_text(json.dumps(document))
    train, val = voc.read_splits(folder, "detection")
    assert [category.name for category in train.categories] == ["cat"]
    assert (train.absent, val.absent) == ((), ())
    assert val.photos[0].path == folder / "valid" / "1.jpg"
    assert perfect.average_precisions(val.truth, perfect.results(val), "bbox", "pycocotools")[0] == pytest.approx(1)


@pytest.mark.parametrize("place", ["images", "images/train", "train2017"])
def test_images_may_lie_in_other_folders(place, made):
    folder, document = made
    put(folder, document)
    (folder / "images").mkdir()
    (folder / "train").rename(folder / place)
    assert coco.read_split(folder, "train", "detection").photos[0].path == folder / place / "1.jpg"


def test_two_images_of_one_name_are_told_apart_by_their_folders(made):
    folder, document = made
    for name in ("a", "b"):
        (folder / "train" / name).mkdir()
    (folder / "train" / "1.jpg").rename(folder / "train" / "a" / "x.jpg")
    (folder / "train" / "2.jpg").rename(folder / "train" / "b" / "x.jpg")
    for row, name in zip(document["images"], ("b", "a"), strict=True):
        row["file_name"] = f"job_1/{name}/x.jpg"
    put(folder, document)
    assert [p.path.parent.name for p in coco.read_split(folder, "train", "detection").photos] == ["b", "a"]
    document["images"][0]["file_name"] = "c/x.jpg"  # which of them?
    put(folder, document)
    with pytest.raises(ValueError, match="lacks 1 of the 2 images"):
        coco.read_split(folder, "train", "detection")


def test_splits_belong_together_by_the_names_of_their_categories(made):
    folder, document = made
    document["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    for number, annotation in enumerate(document["annotations"]):
        annotation["category_id"] = 1 + number % 2
    put(folder, document, "train")
    swapped = {1: 20, 2: 10}
    document["categories"] = [{"id": 10, "name": "cat"}, {"id": 20, "name": "dog"}, {"id": 30, "name": "unused"}]
    for annotation in document["annotations"]:
        annotation["category_id"] = swapped[annotation["category_id"]]
    put(folder, document, "val")
    train, val = voc.read_splits(folder, "detection")
    assert val.categories == train.categories
    assert [p.labels.tolist() for p in val.photos] == [p.labels.tolist() for p in train.photos] == [[1, 2], [1, 2]]
    assert {row["category_id"] for row in val.truth["annotations"]} == {1, 2}
    assert perfect.average_precisions(val.truth, perfect.results(val), "bbox", "pycocotools")[0] == pytest.approx(1)
    for annotation in document["annotations"]:
        annotation["category_id"] = 30
    put(folder, document, "val")
    with pytest.raises(ValueError, match=r"different categories \(unused only in the second\)"):
        voc.read_splits(folder, "detection")


def test_a_category_that_only_training_has_is_absent(made, caplog):
    folder, document = made
    put(folder, document, "val")
    document["categories"].append({"id": 9, "name": "dog"})
    document["annotations"][0]["category_id"] = 9
    put(folder, document, "train")
    caplog.set_level(logging.INFO)
    train, val = voc.read_splits(folder, "detection")
    assert (train.absent, val.absent) == ((), ("dog",))
    assert [category.name for category in val.categories] == ["cat", "dog"]


# ---- real data -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Path:
    folder = SHARED / "data" / "detection"
    if not folder.is_dir():
        pytest.skip(f"the photos are not at hand ({folder})")
    return folder


@pytest.mark.parametrize("task", ["detection", "instances"])
def test_real_annotations_are_scored_as_the_file_itself(task, real):
    """Of COCO's annotations nothing but boxes that end beyond the image is repaired: a bad detector's figures stay."""
    split = coco.read_split(real, "val", task)
    rng = np.random.default_rng(0)
    found = perfect.results(split)
    for row in found:
        row["bbox"] = (np.array(row["bbox"]) + rng.normal(0, 4, 4)).clip(1).tolist()
        row["score"] = float(rng.random())
    raw = json.loads(split.path.read_text())
    sizes = {row["id"]: np.array([row["width"], row["height"]]) for row in raw["images"]}
    for row in raw["annotations"]:  # 15 end up to 0.4 pixels beyond their image, whose size was rounded
        start = np.array(row["bbox"][:2])
        row["bbox"][2:] = np.minimum(row["bbox"][2:], sizes[row["image_id"]] - start).tolist()
    for kind in ("bbox", "segm")[: 1 + (task == "instances")]:
        ours, theirs = (perfect.average_precisions(t, found, kind, "pycocotools") for t in (split.truth, raw))
        assert ours == pytest.approx(theirs, abs=1e-9)
        assert 0.1 < ours[0] < 1.01


def test_real_annotations_come_back_from_an_exporter(real, tmp_path):
    """globox numbers images, categories and annotations from 0, gives every box an `ignore` and no polygon."""
    globox = pytest.importorskip("globox", reason="globox is not installed: pip install 'clove-hub[test]'")
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(real / split)
        annotations = globox.AnnotationSet.from_coco(real / "annotations" / f"instances_{split}.json")
        path = tmp_path / "annotations" / f"instances_{split}.json"
        annotations.save_coco(path, auto_ids=True)
    assert read_document(path).annotations[0]["name"] == 0
    train, val = voc.read_splits(tmp_path, "detection")
    assert [c.name for c in train.categories] == [c.name for c in val.categories]
    assert len(train.categories) > len({row["category_id"] for row in val.truth["annotations"]})
    figures = perfect.average_precisions(val.truth, perfect.results(val), "bbox", "pycocotools")
    assert figures[0] == pytest.approx(1, abs=1e-9)
