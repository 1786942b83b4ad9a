"""`clove-hub check` finds what a fine-tuning would stumble over: broken images, and those that contradict their annotations."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import scenes
from pictures import encoded, jpeg, picture
from PIL import Image

from clove_hub.check import Images, check
from clove_hub.cli import main


def coco_folder(root: Path, size: tuple[int, int] = (40, 30)) -> Path:
    """Three photos a split, each with a box; annotations for the width and height given."""
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / split).mkdir()
        for number in range(3):
            (root / split / f"{number}.jpg").write_bytes(jpeg(number))
        document = {
            "images": [{"id": n, "file_name": f"{n}.jpg", "width": size[0], "height": size[1]} for n in range(3)],
            "annotations": [{"id": n + 1, "image_id": n, "category_id": 1, "bbox": [1, 2, 10, 12]} for n in range(3)],
            "categories": [{"id": 1, "name": "thing"}],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
    return root


def turned(path: Path, number: int = 6) -> None:
    """Stores another EXIF orientation, as a phone does."""
    exif = Image.Exif()
    exif[0x0112] = number
    with Image.open(path) as image:
        data = encoded(image, "JPEG", exif=exif.tobytes())
    path.write_bytes(data)


def test_a_sound_data_set_is_said_to_be_so(tmp_path, capsys):
    data = coco_folder(tmp_path / "coco")
    assert main(["check", str(data)]) == 0
    said = capsys.readouterr().out
    assert "train: 3 images\n  width: 40 to 40, median 40 pixels\n  height: 30 to 30, median 30 pixels\n" in said
    assert said.endswith("all 6 images are good\n")


def test_a_photo_that_exif_turns_contradicts_annotations_of_the_unturned_one_and_the_advice_helps(tmp_path, capsys):
    data = coco_folder(tmp_path / "coco")
    turned(data / "val" / "1.jpg")
    assert main(["check", str(data), "--task", "detection", "--workers", "0"]) == 1
    said = capsys.readouterr().out
    assert "val/1.jpg: 30 x 40 pixels, its annotations are for 40 x 30; they fit the stored image" in said
    assert "before its EXIF orientation (6) is applied: remove the orientation (exiftool -Orientation= FILE)" in said
    assert "1 of 6 images is bad" in said
    turned(data / "val" / "1.jpg", 1)  # which is what exiftool would do
    assert main(["check", str(data)]) == 0


def test_another_size_without_a_turn_is_only_named(tmp_path, capsys):
    data = coco_folder(tmp_path / "coco", size=(30, 40))
    assert main(["check", str(data)]) == 1
    said = capsys.readouterr().out
    assert "train/0.jpg: 40 x 30 pixels, its annotations are for 30 x 40\n" in said
    assert "EXIF" not in said


def test_a_turn_without_another_size_is_a_question(tmp_path, capsys):
    data = coco_folder(tmp_path / "coco")
    turned(data / "train" / "2.jpg", 3)
    assert main(["check", str(data)]) == 0
    said = capsys.readouterr().out
    assert "1 are turned or mirrored by their EXIF orientation, 1 of them without a change of size" in said
    assert "train/2.jpg): check that their annotations were made on the upright image" in said


def test_masks_are_held_against_their_photos_in_every_split(tmp_path, capsys):
    data = scenes.segmented_images(tmp_path)
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(data / "labels" / "train2.png")
    Image.fromarray(np.full((70, 100), 9, np.uint8)).save(data / "labels" / "test1.png")
    (data / "images" / "test0.png").write_bytes(b"")
    assert main(["check", str(data)]) == 1
    said = capsys.readouterr().out
    assert "labels/train2.png is 30x20 pixels" in said
    assert "labels/test1.png has the class 9" in said
    assert "images/test0.png: the file is empty" in said
    assert all(f"{split}: " in said for split in ("train", "test", "val"))


def test_wrong_input_is_refused(tmp_path, capsys):
    assert main(["check", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    assert main(["check", str(tmp_path)]) == 2
    assert "holds no image" in capsys.readouterr().err
    assert main(["check", str(tmp_path), "--task", "instances"]) == 2
    assert "instances_train.json" in capsys.readouterr().err
    assert main(["check", str(tmp_path), "--workers", "-1"]) == 2
    assert "--workers is -1" in capsys.readouterr().err


class Killed(Images):
    """Its second image ends the process, as a crash of a decoder would."""

    def problem(self, index: int, size: tuple[int, int]) -> str:
        if index == 1:
            os._exit(11)
        return ""


def test_a_process_that_dies_is_an_error_and_no_endless_wait(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(encoded(picture(number)))
    images = Killed(sorted(tmp_path.iterdir()))
    with pytest.raises(ValueError, match="a process that decodes images was killed"):
        list(check(images, range(4), workers=2))


XML = """<annotation><filename>{n}.jpg</filename><size><width>40</width><height>30</height><depth>3</depth></size>
<object><name>thing</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>11</xmax><ymax>14</ymax></bndbox></object></annotation>"""


def test_boxes_of_voc_are_held_against_their_photos(tmp_path, capsys):
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        for number in range(2):
            (tmp_path / split / f"{number}.jpg").write_bytes(jpeg(number))
            (tmp_path / split / f"{number}.xml").write_text(XML.format(n=number))
    assert main(["check", str(tmp_path)]) == 0
    assert "val: 2 images" in capsys.readouterr().out
    turned(tmp_path / "valid" / "1.jpg", 8)
    assert main(["check", str(tmp_path)]) == 1
    assert "valid/1.jpg: 30 x 40 pixels, its annotations are for 40 x 30; they fit" in capsys.readouterr().out
