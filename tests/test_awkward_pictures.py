"""One folder of awkward pictures through every command: the same pixels, the same count, nothing stops, all named."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from awkward import Awkward, awkward_pictures
from fine_tuning import SEGMENTER, downstream
from PIL import Image
from training_runs import overrides

from clove_hub.check import CHECK
from clove_hub.cli import main
from clove_hub.data.finder import find_images
from clove_hub.data.images import decode, read_image
from clove_hub.evaluation.run import find_protocol, make_settings
from clove_hub.training.sources import DataSettings, open_source
from clove_hub.weights.backbone import Backbone, Preprocessing

pytest_plugins = ["downstream_fixtures"]
PLAIN = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_pct=1.0)


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Awkward:
    """Of a real photo where scikit-image, which brings some, is installed."""
    try:
        import skimage
    except ImportError:
        pixels = None
    else:
        cat = Image.open(Path(skimage.__file__).parent / "data" / "chelsea.png").convert("RGB")
        pixels = np.array(cat.resize((81, 60), Image.Resampling.LANCZOS))
    return awkward_pictures(tmp_path_factory.mktemp("awkward") / "pictures", pixels)


def outcome(protocol: str, data: Path, **settings: object):
    with torch.no_grad():
        return find_protocol(protocol).evaluate(
            Backbone(scenes.Colors(), PLAIN, "colors"), data, make_settings(protocol, settings), 0
        )


# ---- one reader, one finder ------------------------------------------------------------------------------------------


def test_every_kind_is_read_as_what_it_shows(awkward):
    assert len(awkward.good) > 50
    for name, expected in awkward.good.items():
        pixels = read_image(awkward.root / os.fsdecode(name))
        assert pixels.shape == expected.pixels.shape, name
        assert np.abs(pixels.astype(int) - expected.pixels).mean() <= expected.error, name


def test_training_gets_the_same_pixels(awkward):
    source = open_source(DataSettings(str(awkward.root)))
    assert len(source) == len(awkward.good) + len(awkward.broken)
    for index in range(len(source)):
        name, data = source.read(index) if source.names[index] in awkward.good else ("", b"")
        if name:
            path = awkward.root / os.fsdecode(source.names[index])
            np.testing.assert_array_equal(decode(data, name), read_image(path), name)


def test_what_is_an_image_is_found_in_the_order_of_its_bytes_and_the_rest_is_counted(awkward):
    found = find_images(awkward.root)
    assert found.names == sorted([*awkward.good, *map(os.fsencode, awkward.broken)])
    assert found.tally.left_out == awkward.left_out
    assert found.tally.taken.total() == len(found.names)
    assert found.tally.taken[".jpeg"] == 1  # Mixed.JpEg
    said = str(found.tally)
    assert said.startswith(f"{len(found.names)} images (")
    assert (
        "left out: 2 hidden, 1 .cr2, 1 .csv, 1 .txt, 1 special (pipes, sockets, devices), 1 without an ending" in said
    )


def test_sockets_and_devices_are_passed_over(tmp_path):
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        before = os.getcwd()
        os.chdir(tmp_path)  # the name of a socket is short
        try:
            server.bind("talk.jpg")
        finally:
            os.chdir(before)
        found = find_images(tmp_path)
    assert found.names == []
    assert list(found.tally.left_out.values()) == [2]


# ---- every command ---------------------------------------------------------------------------------------------------


def test_pretraining_replaces_and_names_what_is_broken(awkward, tmp_path, capfd):
    count = len(awkward.good) + len(awkward.broken)
    words = overrides(awkward.root, tmp_path / "run", batch__total=count, batch__per_device=count, schedule__steps=2)
    assert main(["pretrain", "demo", *words]) == 0
    said = capfd.readouterr().err
    assert f"{awkward.root}: {find_images(awkward.root).tally}" in said
    for name, reason in awkward.broken.items():
        assert re.search(rf"replaced the image {re.escape(name)}: .*{reason}", said), name
    assert set(re.findall(r"replaced the image (.*?): ", said)) == set(awkward.broken)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000002" / "state.json").read_text())
    assert state["data"]["images"] == count


def test_evaluation_leaves_out_and_names_what_is_broken(awkward, tmp_path):
    found = outcome("correspond", awkward.root, size=32)
    assert sorted(name for name, _ in found.left_out) == sorted(awkward.broken)
    assert all(awkward.broken[name] in reason for name, reason in found.left_out)
    assert found.data.samples == len(awkward.good)

    data = scenes.class_images(tmp_path)
    for split in ("train", "val"):
        (data / split / "pictures").symlink_to(awkward.root)
    found = outcome("knn", data, batch=7)
    names = [f"{split}/pictures/{name}" for split in ("train", "val") for name in sorted(awkward.broken)]
    assert sorted(name for name, _ in found.left_out) == sorted(names)
    assert found.data.samples == len(awkward.good) + 12


def test_the_command_says_what_it_took_and_records_what_it_left_out(awkward, tmp_path, capfd):
    words = ["--data", str(awkward.root), "--json", str(tmp_path / "result.json"), "size=32"]
    assert main(["evaluate", "correspond", "--model", "random:test_resnet", *words]) == 0
    said = capfd.readouterr()
    assert f"{awkward.root}: {find_images(awkward.root).tally}" in said.err
    assert all(f"left out {name}: " in said.err for name in awkward.broken)
    assert f"{len(awkward.good)} samples" in said.out
    record = json.loads((tmp_path / "result.json").read_text())
    assert sorted(name for name, _ in record["left_out"]) == sorted(awkward.broken)


def test_figures_leave_out_and_name_what_is_broken(awkward, tmp_path, capfd):
    count = len(awkward.good) + len(awkward.broken)
    words = ["--model", "random:test_resnet", "--size", "32", "--photos", str(count), "--dpi", "30"]
    assert main(["figures", "pca", "--data", str(awkward.root), "--out", str(tmp_path / "pca.png"), *words]) == 0
    said = capfd.readouterr().err
    assert f"{awkward.root}: {find_images(awkward.root).tally}" in said
    assert all(f"left out {awkward.root}/{name}: " in said for name in awkward.broken)
    assert (tmp_path / "pca.png").stat().st_size > 1000


@pytest.fixture
def labeled(awkward, tmp_path) -> Path:
    """The pictures with a mask each, in the plain layout; formats are known by their content, so all end in .jpg."""
    data = tmp_path / "labeled"
    for name in ("images", "labels"):
        (data / name).mkdir(parents=True)
    (data / "classes.json").write_text('{"classes": [{"id": 0, "name": "left"}, {"id": 1, "name": "right"}]}')
    names = []
    for number, (name, expected) in enumerate(awkward.good.items()):
        height, width = expected.pixels.shape[:2]
        shutil.copy(awkward.root / os.fsdecode(name), data / "images" / f"p{number}.jpg")
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[:, width // 2 :] = 1
        Image.fromarray(mask).save(data / "labels" / f"p{number}.png")
        names.append(f"p{number}\n")
    for split in ("train", "val"):
        (data / f"{split}.txt").write_text("".join(names))
    return data


@pytest.mark.slow
@pytest.mark.usefixtures("as_in_a_process_of_its_own")
def test_fine_tuning_takes_every_kind_and_refuses_what_is_broken_before_the_first_step(
    awkward, labeled, tmp_path, capfd
):
    pytest.importorskip("torchvision", reason="torchvision is not installed: pip install 'clove-hub[downstream]'")
    out = tmp_path / "out"
    assert downstream("segmentation", labeled, out, SEGMENTER, schedule__epochs=1, schedule__steps="null") == 0
    assert f"all {2 * len(awkward.good)} images can be read" in capfd.readouterr().err
    assert json.loads((out / "results.json").read_text())["data"]["samples"] == len(awkward.good)

    shutil.copy(awkward.root / "page.jpg", labeled / "images" / "p3.jpg")
    os.truncate(labeled / "images" / "p4.jpg", 0)
    assert downstream("segmentation", labeled, tmp_path / "other", SEGMENTER) == 2
    said = capfd.readouterr().err
    assert f"4 of {2 * len(awkward.good)} images cannot be used" in said
    assert re.search(
        r"p3\.jpg: not an image.*p4\.jpg: the file is empty.*`clove-hub check .* --task segmentation`", said
    )
    assert not (tmp_path / "other").exists()


# ---- clove-hub check -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_check_lists_what_is_broken_and_counts_the_rest(awkward, workers, capsys):
    assert CHECK.description
    assert main(["check", str(awkward.root), "--workers", str(workers)]) == 1
    said = capsys.readouterr().out
    for name, reason in awkward.broken.items():
        assert re.search(rf"^{re.escape(name)}: .*{reason}", said, re.MULTILINE), name
    count = len(awkward.good) + len(awkward.broken)
    assert said.endswith(f"{len(awkward.broken)} of {count} images are bad\n")
    assert str(find_images(awkward.root).tally) in said
    assert "width: 1 to " in said
