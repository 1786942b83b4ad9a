"""Images are checked before the first step of a fine-tuning, and for the same data once."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator
from pictures import encoded, files, picture

from clove_hub.check import Images
from clove_hub.training.finetune.splits import DONE, require_sound
from clove_hub.training.run.folder import RunFolder
from clove_hub.training.run.peers import Peers


def test_a_check_is_remembered_for_the_data_that_it_was_of(tmp_path: Path) -> None:
    folder, out = files(tmp_path / "photos", "a.jpg", "b.jpg"), tmp_path / "run"
    images = Images([folder / "a.jpg", folder / "b.jpg"])

    def check(fingerprint: str) -> None:
        with RunFolder(out, Peers(1.0), 1, "--out") as run:
            require_sound(run, fingerprint, [images], Accelerator(cpu=True), 0, "clove-hub check photos")

    check("first")
    (folder / "b.jpg").write_bytes(b"torn")
    check("first")  # not decoded again
    with pytest.raises(
        ValueError, match=r"1 of 2 images cannot be used: .*b\.jpg: not an image.*clove-hub check photos"
    ):
        check("second")
    check("first")
    (out / DONE).write_text("{torn")
    with pytest.raises(ValueError, match="1 of 2 images"):
        check("first")
    (folder / "b.jpg").write_bytes(encoded(picture()))
    check("first")
    assert (out / DONE).read_text() == '{"data": "first"}\n'


def test_the_first_bad_ones_are_named_and_nothing_is_left_behind(tmp_path: Path) -> None:
    folder = files(tmp_path / "photos", *(f"{number}.jpg" for number in range(5)))
    images = Images(sorted(folder.iterdir()), [(40, 30)] + [(30, 40)] * 4)
    message = r"4 of 5 images .*1\.jpg: 40 x 30 pixels.*2\.jpg.*3\.jpg: [^;]*; \.\.\.\. `c`"
    with pytest.raises(ValueError, match=message), RunFolder(tmp_path / "run", Peers(1.0), 1, "--out") as run:
        require_sound(run, "data", [images], Accelerator(cpu=True), 2, "c")
    assert not (tmp_path / "run").exists()
