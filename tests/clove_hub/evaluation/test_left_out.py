"""An image that cannot be read is left out of an evaluation: counted, named, and the same in all processes."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from PIL import Image
from torch import distributed as dist
from torch import multiprocessing as mp

from clove_hub.data.images import BrokenImage
from clove_hub.evaluation.reading import central_square, settle
from clove_hub.evaluation.result import Outcome
from clove_hub.evaluation.run import find_protocol, make_settings, private_state
from clove_hub.weights.backbone import Backbone, Preprocessing

PLAIN = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_pct=1.0)
TORN = b"torn"
MADE = {
    "classes": scenes.class_images,
    "segmented": scenes.segmented_images,
    "clips": lambda folder: scenes.moving_clips(folder, clips=3, frames=4),
    "distant": scenes.distant_blocks,
    "pairs": scenes.keypoint_pairs,
    "boxed": scenes.boxed_objects,
}
# The broken ones are the last of their lists: random numbers follow an image's place.
CASES = {
    "correspond": ("classes", {"size": 32, "batch": 5}, ["val/class2/3.png"]),
    "knn": ("classes", {"neighbors": 3, "batch": 5}, ["train/class1/3.png", "val/class2/0.png"]),
    "linear-svm": ("classes", {"resize": 32, "crop": 32, "batch": 5}, ["train/class1/3.png", "val/class2/0.png"]),
    "dense-probe": (
        "segmented",
        {"height": 64, "width": 96, "epochs": 2, "seeds": 2, "batch": 4},
        ["images/train5.png", "images/test3.png"],
    ),
    "linear-seg": (
        "segmented",
        {"steps": 5, "batch": 2, "crop": 64, "learning_rate": 0.05, "test": "test"},
        ["images/train5.png", "images/test3.png"],
    ),
    "in-context": (
        "segmented",
        {"size": 64, "neighbors": 5, "batch": 2, "memory": 300, "test": "test"},
        ["images/train5.png", "images/test3.png"],
    ),
    "cluster": (
        "segmented",
        {"size": 64, "clusters": [0, 9], "seeds": 3, "batch": 2, "test": "test"},
        ["images/test3.png"],
    ),
    "retrieve": ("segmented", {"regions": 4}, ["images/train5.png", "images/test3.png"]),
    "propagate": ("clips", {"context": 2}, ["JPEGImages/clip2/00002.png"]),
    "depth": (
        "distant",
        {"crop": [64, 96], "steps": 6, "batch": 3, "seeds": 2},
        ["train_0001/rgb_00005.jpg", "test_0001/rgb_00003.jpg"],
    ),
    "match": ("pairs", {"size": 64}, ["JPEGImages/bus/2008_000011.jpg"]),
    "discover": ("boxed", {"patches": 4}, ["JPEGImages/000005.jpg"]),
}
"""The data, the settings, and the images that are broken."""


def outcome(name: str, data: Path) -> Outcome:
    protocol, settings = find_protocol(name), make_settings(name, CASES[name][1])
    with torch.no_grad(), private_state(0, torch.device("cpu")):
        return protocol.evaluate(Backbone(scenes.Colors(), PLAIN, "colors"), data, settings, 0)


def without(data: Path, broken: list[str]) -> None:
    """Takes the images out of a data set as a user would."""
    for name in broken:
        path = data / name
        if path.parent.name.startswith("clip"):
            shutil.rmtree(path.parent)
            (data / "val.txt").write_text((data / "val.txt").read_text().replace(f"{path.parent.name}\n", ""))
        else:
            path.unlink()
            for listed in data.rglob("*.txt"):  # a list names an image by its stem, a path or a part of a pair's name
                lines = listed.read_text().splitlines()
                kept = [line for line in lines if name not in line and path.stem not in re.split("[-:]", line)]
                listed.write_text("".join(f"{line}\n" for line in kept))


@pytest.mark.parametrize("name", CASES)
def test_the_figures_are_those_of_the_set_without_what_cannot_be_read(name, tmp_path, caplog):
    kind, _, broken = CASES[name]
    data = MADE[kind](tmp_path / "data")
    for path in broken:
        (data / path).write_bytes(TORN)
    found = outcome(name, data)
    assert [path for path, _ in found.left_out] == broken
    assert all("not an image" in reason for _, reason in found.left_out)
    assert all(f"left out {path}: not an image" in caplog.text for path in broken)
    without(data, broken)
    alone = outcome(name, data)
    assert found.metrics == pytest.approx(alone.metrics, abs=1e-4)
    assert found.data == alone.data
    assert alone.left_out == ()


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, object] = {}
    for name, (kind, _, _) in CASES.items():
        one = outcome(name, Path(folder, kind, name))
        found[name] = [one.metrics, one.data.fingerprint, [list(pair) for pair in one.left_out]]
    try:
        outcome("knn", Path(folder, "too_many"))
    except ValueError as error:
        found["too many"] = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_leave_out_what_one_leaves_out(tmp_path):
    for name, (kind, _, broken) in CASES.items():
        data = MADE[kind](tmp_path / kind / name)
        for path in broken:
            (data / path).write_bytes(TORN)
    for path in sorted(scenes.class_images(tmp_path / "too_many").rglob("*.png"))[:23]:
        path.write_bytes(b"")
    mp.start_processes(one_of_two, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for name, (kind, _, _) in CASES.items():
        alone = outcome(name, tmp_path / kind / name)
        assert first[name] == [alone.metrics, alone.data.fingerprint, [list(pair) for pair in alone.left_out]]
    assert first["too many"].startswith(f"23 of 24 images in {tmp_path / 'too_many'} cannot be read")
    assert "train/class0/0.png: the file is empty" in first["too many"]
    assert "clove-hub check" in first["too many"]


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (7, 3), (20, 10), (100, 10), (150, 15), (1000, 100)])
def test_a_tenth_may_be_broken_and_ten_of_a_small_set_but_never_more_than_half(count, most):
    def problems(broken: int) -> list[BrokenImage | None]:
        return [BrokenImage(f"/photos/{n}.jpg", "torn") if n < broken else None for n in range(count)]

    assert len(settle(problems(most), Path("/photos"))) == most
    with pytest.raises(ValueError, match=rf"{most + 1} of {count} images .*: 0\.jpg: torn"):
        settle(problems(most + 1), Path("/photos"))


def test_of_many_the_first_are_named_and_the_rest_counted(caplog):
    settle([BrokenImage(f"{n}.jpg", "torn") if n < 30 else None for n in range(1000)])
    assert "30 of 1000 images cannot be read" in caplog.text
    assert "left out 19.jpg: torn" in caplog.text
    assert "left out 20.jpg" not in caplog.text
    assert "and 10 more" in caplog.text


def test_a_class_of_which_no_image_can_be_read_is_named(tmp_path):
    data = scenes.class_images(tmp_path)
    for path in (data / "train" / "class1").iterdir():
        path.write_bytes(TORN)
    for name, message in (("knn", "class 'class1' can be read"), ("linear-svm", "'class1' .* is in no training image")):
        with pytest.raises(ValueError, match=message):
            outcome(name, data)


def test_a_row_of_pixels_does_not_fill_the_memory():
    halves = np.repeat(np.array([0, 255], dtype=np.uint8), 50_000)
    photo = Image.fromarray(np.broadcast_to(halves[None, :, None], (1, 100_000, 3)).copy())
    square = central_square(photo, 256, 224, "bicubic")  # resized whole it would have seven billion pixels
    assert square.size == (224, 224)
    columns = np.asarray(square)[:, :, 0].astype(int)
    assert columns[:, 0].max() < 60
    assert columns[:, -1].min() > 195
