"""PASCAL VOC: boxes in XML, whoever exported them, and lists of the images that show a class."""

from pathlib import Path

import numpy as np
import perfect
import pytest
from conftest import SHARED
from fine_tuning import DETECTOR, downstream
from PIL import Image

from clove_hub.data import voc

pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install 'clove-hub[downstream]'")

OBJECT = (
    "<object><name>{name}</name><difficult>0</difficult>"
    "<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"
)
SIZE = "<size><width>64</width><height>48</height><depth>3</depth></size>"


def thing(name: str, *corners: float) -> str:
    return OBJECT.format(*corners, name=name)


def write(path: Path, *objects: str, filename: str = "", size: str = SIZE, photo: Path | None = None) -> None:
    """An annotation, and its image beside it or at `photo`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><filename>{filename}</filename>{size}{''.join(objects)}</annotation>")
    photo = path.with_suffix(".jpg") if photo is None else photo
    photo.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(photo)


def flat(folder: Path, *objects: str, **options: str) -> Path:
    """As Roboflow exports it: train/ and valid/ with an XML file beside each image."""
    for split in ("train", "valid"):
        write(
            folder / split / "a.xml",
            *(objects or (thing("cat", 1, 1, 20, 10), thing("dog", 31, 21, 64, 48))),
            **options,
        )
    return folder


def boxes(folder: Path) -> list[list[float]]:
    return voc.read_splits(folder, "detection")[0].photos[0].boxes.tolist()


def test_boxes_count_pixels_from_1_and_include_the_last(tmp_path):
    train, val = voc.read_splits(flat(tmp_path), "detection")
    assert train.photos[0].boxes.tolist() == [[0, 0, 20, 10], [30, 20, 64, 48]]
    assert [category.name for category in train.categories] == ["cat", "dog"]
    assert train.photos[0].labels.tolist() == [1, 2]
    assert (train.photos[0].height, train.photos[0].width) == (48, 64)
    assert perfect.average_precisions(val.truth, perfect.results(val), "bbox", "pycocotools")[0] == pytest.approx(1)


def test_a_box_at_0_shows_that_its_exporter_counts_from_0(tmp_path):
    assert boxes(flat(tmp_path, thing("cat", 0.0, 3.5, 20.25, 10), thing("cat", 2, 2, 64, 48))) == [
        [0, 3.5, 20.25, 10],
        [2, 2, 64, 48],
    ]


def test_numbers_are_found_by_their_names_and_parts_are_passed_over(tmp_path):
    """Roboflow writes xmin, xmax, ymin, ymax; in VOC 2012 a person has a head with a name and a box."""
    mixed = (
        "<object><part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        "<name>person</name><truncated>Unspecified</truncated>"
        "<bndbox><xmin>11</xmin><xmax>30</xmax><ymin>6</ymin><ymax>40</ymax></bndbox></object>"
    )
    swapped = thing("person", 30, 40, 11, 6)
    assert boxes(flat(tmp_path, mixed, swapped)) == [[10, 5, 30, 40]] * 2


def test_what_is_difficult_is_not_learned_and_not_scored(tmp_path):
    hard = thing("cat", 31, 21, 64, 48).replace("<difficult>0", "<difficult>1")
    train, val = voc.read_splits(flat(tmp_path, thing("cat", 1, 1, 20, 10), hard), "detection")
    assert train.photos[0].boxes.tolist() == [[0, 0, 20, 10]]
    found = perfect.results(val)
    there = {"image_id": 1, "category_id": 1, "bbox": [30, 20, 34, 28], "score": 1.0}  # neither a hit nor a miss
    for rows in (found, [*found, there]):
        assert perfect.average_precisions(val.truth, rows, "bbox", "pycocotools")[0] == pytest.approx(1)


def test_a_size_that_is_missing_is_that_of_the_image(tmp_path, caplog):
    zero = SIZE.replace("64", "0")
    for number, size in enumerate((zero, "")):
        train, _ = voc.read_splits(flat(tmp_path / str(number), size=size), "detection")
        assert (train.photos[0].height, train.photos[0].width) == (48, 64)
    assert "1 files lack the size of their image; it is read from the images: a.xml" in caplog.text


@pytest.mark.parametrize("told", ["C:\\photos\\b.jpg", "b.jpg", "b"])
def test_an_image_of_another_name_is_found_by_what_the_file_says(told, tmp_path):
    flat(tmp_path, filename=told)
    (tmp_path / "train" / "a.jpg").rename(tmp_path / "train" / "b.jpg")
    assert voc.read_splits(tmp_path, "detection")[0].photos[0].path.name == "b.jpg"
    (tmp_path / "train" / "b.jpg").unlink()
    Image.new("RGB", (64, 48)).save(tmp_path / "train" / "c.jpg")
    with pytest.raises(ValueError, match=r"the image of .*a\.xml is missing: there is neither a\.\* nor"):
        voc.read_splits(tmp_path, "detection")


def devkit(year: Path, names: dict[str, list[str]]) -> None:
    for split, own in names.items():
        for name in own:
            photo = year / "JPEGImages" / f"{name}.jpg"
            write(year / "Annotations" / f"{name}.xml", thing("cat", 1, 1, 20, 10), photo=photo)
        listed = year / "ImageSets" / "Main" / f"{split}.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("\n".join(own) + "\n")


def test_the_years_of_the_devkit_are_read_together_or_one_alone(tmp_path):
    devkit(tmp_path / "VOC2007", {"train": ["000001", "000002"], "val": ["000003"]})
    devkit(tmp_path / "VOC2012", {"train": ["2008_000001"]})
    train, val = voc.read_splits(tmp_path, "detection")
    assert [photo.path.stem for photo in train.photos] == ["000001", "000002", "2008_000001"]
    assert len(val.photos) == 1
    assert len(voc.read_splits(tmp_path / "VOC2007", "detection")[0].photos) == 2
    with pytest.raises(ValueError, match=r"Main/val\.txt is missing: it names the images of the split val"):
        voc.read_splits(tmp_path / "VOC2012", "detection")


def test_the_fingerprint_follows_the_sizes_of_the_images(tmp_path):
    before = voc.read_splits(flat(tmp_path), "detection")
    photo = before[0].photos[0].path
    photo.write_bytes(photo.read_bytes() + b"x")
    after = voc.read_splits(tmp_path, "detection")
    assert after[0].fingerprint != before[0].fingerprint
    assert after[1].fingerprint == before[1].fingerprint


def test_the_fingerprint_follows_the_annotations(tmp_path):
    before = voc.read_splits(flat(tmp_path / "a"), "detection")[0].fingerprint
    assert voc.read_splits(flat(tmp_path / "b"), "detection")[0].fingerprint == before
    assert voc.read_splits(flat(tmp_path / "c", thing("cat", 1, 1, 20, 11)), "detection")[0].fingerprint != before


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (["<object><name>cat</name></object>"], r"a\.xml has an object 'cat' without a name, or without bndbox"),
        ([thing("", 1, 1, 2, 2)], "has an object '' without a name"),
        ([thing("cat", 1, 1, float("nan"), 2)], "has an object 'cat'"),
        (["<object>"], r"a\.xml cannot be read as XML"),
        ([" "], "has no annotations"),
    ],
)
def test_what_has_no_box_is_named(objects, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        voc.read_splits(flat(tmp_path, *objects), "detection")


def test_other_tasks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="only boxes: choose the task detection"):
        voc.read_splits(flat(tmp_path), "instances")


def test_other_splits_than_the_two_are_refused(tmp_path):
    """They would be recorded, and the usual two used."""
    with pytest.raises(ValueError, match=r"data.train=train data.test=train: .* always train and val: leave both out"):
        voc.read_splits(flat(tmp_path), "detection", "train", "train")


def test_the_categories_are_those_of_both_splits(tmp_path, caplog):
    flat(tmp_path)
    write(tmp_path / "valid" / "a.xml", thing("ape", 1, 1, 20, 10))
    train, val = voc.read_splits(tmp_path, "detection")
    assert [c.name for c in train.categories] == [c.name for c in val.categories] == ["ape", "cat", "dog"]
    assert (train.absent, val.absent) == (("ape",), ("cat", "dog"))
    assert "1 of 3 categories have no annotation and cannot be learned: ape" in caplog.text


def test_real_photos_come_back_from_an_exporter(tmp_path):
    """COCO's boxes, written by globox as VOC's XML, which rounds nothing and counts from 0."""
    globox = pytest.importorskip("globox", reason="globox is not installed: pip install 'clove-hub[test]'")
    data = SHARED / "data" / "detection"
    if not data.is_dir():
        pytest.skip(f"the photos are not at hand ({data})")
    for split in ("train", "val"):
        annotations = globox.AnnotationSet.from_coco(data / "annotations" / f"instances_{split}.json")
        annotations.save_pascal_voc(tmp_path / split)
        for path in (data / split).iterdir():
            (tmp_path / split / path.name).symlink_to(path)
    train, val = voc.read_splits(tmp_path, "detection")
    assert (len(train.photos), len(val.photos)) == (193, 118)
    assert perfect.average_precisions(val.truth, perfect.results(val), "bbox", "pycocotools")[0] == pytest.approx(1)


@pytest.mark.slow
def test_a_folder_of_voc_is_fine_tuned_on(tmp_path):
    import json

    pytest.importorskip("torchvision", reason="torchvision is not installed: pip install 'clove-hub[downstream]'")
    assert downstream("detection", flat(tmp_path / "data"), tmp_path / "out", DETECTOR | {"batch.total": 1}) == 0
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "APbb" in record["metrics"]


# ---- lists -----------------------------------------------------------------------------------------------------------


def test_lists_say_which_images_show_a_class(tmp_path):
    for name in ("1", "2", "3"):
        write(tmp_path / "Annotations" / f"{name}.xml", photo=tmp_path / "JPEGImages" / f"{name}.JPG")
    main = tmp_path / "ImageSets" / "Main"
    main.mkdir(parents=True)
    (main / "cat_test.txt").write_text("1  1\n2 -1\n3  0\n")
    (main / "dog_test.txt").write_text("1 -1\n2 -1\n3 +1\n")
    truth = voc.read_lists(tmp_path, "test")
    assert truth.classes == ["cat", "dog"]
    assert truth.labels.tolist() == [[1, 0, voc.UNSURE], [0, 0, 1]]
    assert [path.name for path in truth.photos] == ["1.JPG", "2.JPG", "3.JPG"]
    (main / "dog_test.txt").write_text("1 -1\n2 yes\n")
    with pytest.raises(ValueError, match="the line '2 yes'; expected a name and 1, -1 or 0"):
        voc.read_lists(tmp_path, "test")
