"""Clips: the layouts, the order of the frames, and objects whatever numbers their masks give them."""

import logging
from pathlib import Path

import numpy as np
import pytest
import scenes
from PIL import Image

from clove_hub.data.clips import find_clips, read_objects


def clip(folder: Path, *masks: list[list[int]], names: tuple[str, ...] = ()) -> Path:
    """One clip with these masks, of the frames 0, 1, ... if they are given no names."""
    for number, mask in enumerate(masks):
        name = names[number] if names else f"{number:05d}"
        for kind in ("JPEGImages", "Annotations"):
            (folder / kind / "dog").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (len(mask[0]), len(mask))).save(folder / "JPEGImages" / "dog" / f"{name}.JPG", "JPEG")
        Image.fromarray(np.array(mask, dtype=np.uint8)).save(folder / "Annotations" / "dog" / f"{name}.png")
    (folder / "val.txt").write_text("dog\n")
    return folder


def objects(folder: Path) -> list[list[list[int]]]:
    return [mask.tolist() for mask in read_objects(find_clips(folder, None)[0])]


def test_a_clip_may_be_cut_short(tmp_path):
    scenes.moving_clips(tmp_path, clips=1, frames=6)
    whole = find_clips(tmp_path, None)[0]
    short = find_clips(tmp_path, 4)[0]
    assert (len(whole.frames), len(short.frames), len(short.masks)) == (6, 4, 4)
    assert short.frames == whole.frames[:4]


def test_the_layout_of_davis(tmp_path):
    scenes.moving_clips(tmp_path / "flat", clips=2, frames=4)
    for kind in ("JPEGImages", "Annotations"):
        (tmp_path / "davis" / kind).mkdir(parents=True)
        (tmp_path / "flat" / kind).rename(tmp_path / "davis" / kind / "480p")
    listed = tmp_path / "davis" / "ImageSets" / "2017" / "val.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("clip1\n")
    assert [clip.name for clip in find_clips(tmp_path / "davis", None)] == ["clip1"]
    listed.write_text("/JPEGImages/480p/clip0/00000.jpg /Annotations/480p/clip0/00000.png\n" * 2)
    assert [clip.name for clip in find_clips(tmp_path / "davis", None)] == ["clip0"]


def test_clips_that_the_list_does_not_name_are_left_out_with_a_word(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    scenes.moving_clips(tmp_path, clips=3, frames=3)
    (tmp_path / "val.txt").write_text("clip1\n")
    assert [found.name for found in find_clips(tmp_path, None)] == ["clip1"]
    assert "2 clips are not in val.txt and are left out: clip0, clip2" in caplog.text


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    names = ("1", "2", "9", "10", "100")
    clip(tmp_path, *([[0, 1]],) * 5, names=names)
    (tmp_path / "JPEGImages" / "dog" / "._1.jpg").write_bytes(b"what a Mac leaves")
    found = find_clips(tmp_path, None)[0]
    assert tuple(frame.stem for frame in found.frames) == tuple(mask.stem for mask in found.masks) == names


def test_objects_whose_numbers_have_gaps_are_numbered_from_1(tmp_path):
    """An object that is nowhere would be found perfectly in every frame."""
    clip(tmp_path, [[0, 3, 7, 255]], [[7, 0, 3, 3]], [[0, 0, 255, 3]])
    assert objects(tmp_path) == [[[0, 1, 2, 0]], [[2, 0, 1, 1]], [[0, 0, 0, 1]]]


def test_what_255_means_is_decided_for_the_clip_by_its_first_mask(tmp_path):
    clip(tmp_path / "void", [[0, 1, 255]], [[0, 0, 255]], [[0, 1, 1]])  # all objects out of sight, void left
    assert objects(tmp_path / "void") == [[[0, 1, 0]], [[0, 0, 0]], [[0, 1, 1]]]
    clip(tmp_path / "one", [[0, 255]], [[255, 255]], [[0, 0]])
    assert objects(tmp_path / "one") == [[[0, 1]], [[1, 1]], [[0, 0]]]


def test_blurred_masks_are_refused(tmp_path):
    """Black and white masks that were resized smoothly have all numbers between."""
    clip(tmp_path, [[0, 255]], [[0, 128]], [[0, 255]])
    with pytest.raises(ValueError, match=r"Annotations/dog has the object 128, which its first mask lacks"):
        objects(tmp_path)
