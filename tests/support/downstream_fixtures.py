"""Small data sets, and what a run needs around it, for the tests of fine-tuning with torchvision."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import SHARED
from PIL import Image


@pytest.fixture
def as_in_a_process_of_its_own():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)  # the precision of one run is not that of the next


@pytest.fixture(scope="module")
def coco_photos(tmp_path_factory) -> Path:
    """Eight training and four validation photos of COCO, with boxes, masks and people's keypoints."""
    data = SHARED / "data" / "detection"
    if not data.is_dir():
        pytest.skip(f"the photos are not at hand ({data})")
    folder = tmp_path_factory.mktemp("detection")
    (folder / "annotations").mkdir()
    for split, count in (("train", 8), ("val", 4)):
        (folder / split).symlink_to(data / split)
        for stem in ("instances", "person_keypoints"):
            document = json.loads((data / "annotations" / f"{stem}_{split}.json").read_text())
            kept = {image["id"] for image in document["images"][:count]}
            document["images"] = [row for row in document["images"] if row["id"] in kept]
            document["annotations"] = [row for row in document["annotations"] if row["image_id"] in kept]
            (folder / "annotations" / f"{stem}_{split}.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def streets(tmp_path_factory) -> Path:
    """Made scenes in the plain layout: 6 to train on, 2 to score."""
    folder = tmp_path_factory.mktemp("streets")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    names = [f"s{number}" for number in range(8)]
    rng = np.random.default_rng(0)
    for name in names:
        label = np.zeros((60, 80), np.uint8)
        label[rng.integers(10, 40) :] = 1
        label[:5] = 255
        picture = np.stack([label * 100 + 50, 200 - label * 50, rng.integers(0, 255, label.shape)], -1)
        Image.fromarray(picture.astype(np.uint8)).save(folder / "images" / f"{name}.jpg")
        Image.fromarray(label).save(folder / "labels" / f"{name}.png")
    (folder / "train.txt").write_text("\n".join(names[:6]))
    (folder / "val.txt").write_text("\n".join(names[6:]))
    classes = [{"id": 0, "name": "sky"}, {"id": 1, "name": "road"}]
    (folder / "classes.json").write_text(json.dumps({"classes": classes, "ignore_label": 255}))
    return folder


NAMES = ("nose", "left_eye", "right_eye", *(f"k{number}" for number in range(14)))


@pytest.fixture
def made(tmp_path) -> tuple[Path, dict]:
    """Two made images a split with two things each, and the document that both splits' annotations are."""
    rng = np.random.default_rng(1)
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for number in (1, 2):
            pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"{number}.jpg")
    (tmp_path / "annotations").mkdir()
    document = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 48, "width": 64} for n in (1, 2)],
        "categories": [{"id": 7, "name": "cat", "keypoints": list(NAMES), "skeleton": [[1, 2]]}],
        "annotations": [
            {
                "id": 10 * image + number,
                "image_id": image,
                "category_id": 7,
                "bbox": [8 * number, 6, 20, 16],
                "area": 320,
                "iscrowd": 0,
                "segmentation": [[8 * number, 6, 8 * number + 20, 6, 8 * number + 20, 22, 8 * number, 22]],
                "keypoints": [value for k in range(17) for value in (8 * number + 1 + k, 7 + k % 12, 2)],
                "num_keypoints": 17,
            }
            for image in (1, 2)
            for number in (1, 4)
        ],
    }
    return tmp_path, document
