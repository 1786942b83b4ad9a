"""Images are checked before the first step of a fine-tuning, and for the same data once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from downstream_fixtures import made  # noqa: F401  (a fixture)
from fine_tuning import put
from PIL import Image

from clove_hub.training.finetune.settings import DetectionImages, DetectionNetwork, FinetuneSettings
from clove_hub.training.finetune.splits import DONE, TaskData, load_data, require_sound
from clove_hub.training.run.folder import RunFolder
from clove_hub.training.run.peers import Peers


def loaded(folder: Path) -> TaskData:
    return load_data(FinetuneSettings("", "detection", DetectionImages(), DetectionNetwork()), folder, (0.5, 0.5, 0.5))


def check(data: TaskData, out: Path, workers: int = 0) -> None:
    with RunFolder(out, Peers(1.0), 1, "--out") as run:
        require_sound(run, data, Accelerator(cpu=True), workers)


def test_a_check_is_remembered_for_the_data_that_it_was_of(made: Any) -> None:  # noqa: F811
    folder, document = made
    out = folder / "run"
    put(folder, document)
    first = loaded(folder)
    second, photo = replace(first, fingerprint="second"), folder / "val" / "2.jpg"
    check(first, out)
    whole = photo.read_bytes()
    photo.write_bytes(b"torn")
    check(first, out)  # not decoded again
    advice = rf"`clove-hub check {folder} --task detection` lists all"
    with pytest.raises(ValueError, match=rf"1 of 4 images cannot be used: .*2\.jpg: not an image.*{advice}"):
        check(second, out)
    check(first, out)
    (out / DONE).write_text("{torn")
    with pytest.raises(ValueError, match="1 of 4 images"):
        check(first, out)
    photo.write_bytes(whole)
    check(first, out)
    assert (out / DONE).read_text() == f'{{"data": "{first.fingerprint}"}}\n'


def test_the_first_bad_ones_are_named_and_nothing_is_left_behind(made: Any) -> None:  # noqa: F811
    folder, document = made
    document["images"].append({"id": 3, "file_name": "3.jpg", "height": 48, "width": 64})
    document["annotations"].append(document["annotations"][0] | {"id": 99, "image_id": 3})
    put(folder, document)
    for split, sizes in {"train": (40, 40, 64), "val": (40, 40, 40)}.items():
        for number, width in enumerate(sizes, start=1):
            Image.new("RGB", (width, 48)).save(folder / split / f"{number}.jpg")
    message = r"5 of 6 images .*1\.jpg: 40 x 48 pixels.*2\.jpg.*1\.jpg: [^;]*; \.\.\.\. `clove-hub check"
    with pytest.raises(ValueError, match=message):
        check(loaded(folder), folder / "run", workers=2)
    assert not (folder / "run").exists()
