"""What fine-tuning says of each class: figures, confusion, legends; and that either package scores alike."""

import copy
import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image

from clove_hub.data import coco

pytest.importorskip("torchvision", reason="torchvision is not installed: pip install 'clove-hub[downstream]'")
pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install 'clove-hub[downstream]'")
pytest_plugins = ["downstream_fixtures"]

from clove_hub.training.finetune import classes, drawing, scores  # noqa: E402


def made_up(split: coco.CocoSplit, kind: str) -> list[dict]:
    """Three detections for each object, moved and with other scores, a fifth of them of another category."""
    rng = np.random.default_rng(0)
    rows = []
    for truth in split.truth["annotations"]:
        for _ in range(3):
            row = {key: copy.deepcopy(truth[key]) for key in ("image_id", "category_id")}
            if rng.random() < 0.2:
                row["category_id"] = split.categories[rng.integers(len(split.categories))].id
            row["score"] = float(np.float32(rng.random()))
            x, y, w, h = truth["bbox"]
            row["bbox"] = [
                float(v + size * rng.normal(0, 0.08)) for v, size in zip((x, y, w, h), (w, h, w, h), strict=True)
            ]
            if kind == "segm":
                image = next(one for one in split.truth["images"] if one["id"] == row["image_id"])
                row["segmentation"] = coco.compressed(truth["segmentation"], image["height"], image["width"])
            if kind == "keypoints":
                points = np.reshape(truth["keypoints"], (-1, 3)).astype(float)
                points[:, :2] += rng.normal(0, 4, (len(points), 2))
                row["keypoints"] = points.ravel().tolist()
            rows.append(row)
    return rows


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_both_packages_give_the_same_figures_to_the_last_digit(kind, coco_photos, monkeypatch):
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    assert scores.package() == "faster-coco-eval"
    split = coco.read_split(coco_photos, "val", {"bbox": "detection", "segm": "instances"}.get(kind, kind))
    rows = made_up(split, kind)
    faster = scores.average_precision(split.truth, rows, [kind])
    monkeypatch.setattr(scores, "package", lambda: "pycocotools")
    assert scores.average_precision(split.truth, rows, [kind]) == faster
    assert 5 < faster[f"AP{scores.SUFFIX[kind]}"] < 95
    assert any("/" in name for name in faster)


def test_objects_are_counted_as_what_they_are_taken_for():
    truth = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]]),
        "labels": torch.tensor([1, 2, 2]),
    }
    found = {
        "boxes": torch.tensor(
            [[0.0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 30, 11], [70, 0, 80, 10], [40, 0, 50, 10], [41, 0, 51, 10]]
        ),
        "labels": torch.tensor([2, 1, 1, 2, 2, 1]),
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.9, 0.4, 0.6]),
    }
    # The first object is where two boxes are, of which the nearer counts; the last is found as the other class, since the
    # right box is below the threshold; one box is where nothing is.
    expected = [[1, 0, 0], [2, 0, 0], [0, 2, 0]]
    assert classes.matched(found, truth, 2, 0.5).tolist() == expected
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    assert classes.matched(nothing, truth, 2, 0.5).tolist() == [[0, 0, 1], [0, 0, 2], [0, 0, 0]]
    assert classes.matched(found, nothing, 2, 0.5)[2].tolist() == [3, 2, 0]


def test_the_table_has_a_row_for_each_class_on_screen_and_in_the_file():
    counts = {"cat": {"images": 3, "instances": 12}, "a, b": {"images": 0, "instances": 0}}
    rows = classes.rows_of({"cat": {"APbb": 51.26, "APmk": 40.0}}, counts)
    assert rows == [
        ["class", "images", "instances", "APbb", "APmk"],
        ["cat", "3", "12", "51.3", "40.0"],
        ["a, b", "0", "0", "-", "-"],
    ]
    lines = classes.as_text(rows).splitlines()
    assert lines[1].split() == ["cat", "3", "12", "51.3", "40.0"]
    assert len({len(line) for line in lines}) == 1
    assert list(csv.reader(io.StringIO(classes.as_csv(rows)))) == rows


def test_a_picture_has_titles_and_a_legend_in_the_colors_of_its_classes(tmp_path):
    picture = torch.full((3, 60, 200), 255, dtype=torch.uint8)
    legend = {f"class number {number}": drawing.palette(number) for number in range(9)}
    drawing.save_beside(tmp_path / "with.jpg", ("annotations", "predictions"), (picture, picture), legend)
    drawing.save_beside(tmp_path / "without.jpg", ("annotations", "predictions"), (picture, picture), {})
    with Image.open(tmp_path / "with.jpg") as one, Image.open(tmp_path / "without.jpg") as other:
        assert one.width == other.width == 408
        assert one.height > other.height + 3 * drawing.LETTERS  # of more than one line
        pixels = np.asarray(one.convert("RGB")).astype(int)[other.height :].reshape(-1, 3)
    for color in legend.values():
        assert (np.abs(pixels - color).max(1) < 12).sum() > 50


def test_a_confusion_picture_is_drawn_for_few_and_for_many_classes(tmp_path):
    for count in (2, 120):
        path = tmp_path / f"{count}.png"
        classes.draw_confusion(torch.eye(count, dtype=torch.int64) * 7, [f"c{n}" for n in range(count)], path)
        with Image.open(path) as picture:
            assert min(picture.size) > 500
