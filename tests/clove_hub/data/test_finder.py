"""Images are found wherever they are, and what is left out is counted with a way to read it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from pictures import encoded, files, jpeg, picture

from clove_hub.data.finder import ABSENT, Tally, find_images, some_images, total
from clove_hub.data.images import EXTRAS, SUFFIXES, BrokenImage, read_bytes, readable_suffixes


def test_the_order_is_that_of_the_bytes_of_the_whole_path(tmp_path: Path) -> None:
    root = files(tmp_path / "photos", "b/1.jpg", "b.jpg", "B.jpg", "b-2/1.jpg", "é.jpg", "z.jpg")
    names = ["B.jpg", "b-2/1.jpg", "b.jpg", "b/1.jpg", "z.jpg", "é.jpg"]
    found = find_images(root)
    assert found.names == [name.encode() for name in names]
    assert found.paths == [root / name for name in names]


def test_sizes_are_those_of_the_images_in_their_order_and_of_what_a_link_leads_to(tmp_path: Path) -> None:
    root = files(tmp_path / "photos", "b.jpg", "a/1.jpg")
    (root / "c.jpg").symlink_to(root / "b.jpg")
    (root / "d.jpg").symlink_to(root / "nowhere.jpg")
    found = find_images(root, with_sizes=True)
    assert found.names == [b"a/1.jpg", b"b.jpg", b"c.jpg", b"d.jpg"]
    assert found.sizes == [len(jpeg(1)), len(jpeg(0)), len(jpeg(0)), ABSENT]
    assert not find_images(root).sizes


@pytest.mark.parametrize("root", [".", "sub/..", "./sub/../"])
def test_names_are_relative_however_the_folder_is_given(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files(tmp_path, "a.jpg", "sub/b.jpg")
    monkeypatch.chdir(tmp_path)
    assert find_images(Path(root)).names == [b"a.jpg", b"sub/b.jpg"]


def test_each_folder_counts_once_by_the_first_path_that_leads_to_it(tmp_path: Path) -> None:
    root = files(tmp_path / "photos", "a/1.jpg", "m/2.jpg")
    (root / "a" / "up").symlink_to(root)
    (root / "b").symlink_to(root / "m")
    assert find_images(root).names == [b"a/1.jpg", b"b/2.jpg"]
    assert find_images(root).tally.taken == {".jpg": 2}


def test_a_count_reads_as_a_sentence_and_names_the_way_out() -> None:
    tally = Tally(Counter({".jpg": 1180, ".png": 20}), Counter({".heic": 40, ".txt": 3}))
    assert str(tally) == (
        "1200 images (1180 .jpg, 20 .png); left out: 40 .heic (needs pip install 'clove-hub[heic]'), 3 .txt"
    )
    assert str(Tally(Counter({".png": 2}))) == "2 images (2 .png)"
    assert str(total([tally, Tally(Counter({".png": 2}))])).startswith("1202 images (1180 .jpg, 22 .png)")
    many = Tally(left_out=Counter({f".{n:02}": 30 - n for n in range(20)}))
    assert str(many).endswith("23 .07, 198 others")


def test_a_folder_without_images_is_refused_with_what_is_there(tmp_path: Path) -> None:
    files(tmp_path, "a.txt", ".b.jpg")
    with pytest.raises(ValueError, match=r"holds no image\. Looked for .*\.avif, .*; found 1 \.txt, 1 hidden\."):
        some_images(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere is not a folder"):
        find_images(tmp_path / "nowhere")


def test_nobody_waits_for_the_other_end_of_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(BrokenImage, match=r"a\.jpg: not a regular file"):
        read_bytes(tmp_path / "a.jpg", "a.jpg")


def test_every_ending_is_taken_in_any_case(tmp_path: Path) -> None:
    endings = [*SUFFIXES, *(ending for ending in EXTRAS if ending in readable_suffixes())]
    files(tmp_path, *(f"{number}{ending.upper()}" for number, ending in enumerate(endings)))
    assert find_images(tmp_path).tally == Tally(Counter(dict.fromkeys(endings, 1)))


WITHOUT = """
import sys
from pathlib import Path
sys.modules |= {"pillow_heif": None, "pillow_jxl": None}  # as if they were not installed
from clove_hub.data.finder import find_images
from clove_hub.data.images import BrokenImage, read_image
print(find_images(Path(sys.argv[1])).tally)
for name in ("a.jpg", "b.jpg"):
    try:
        read_image(Path(sys.argv[1], name))
    except BrokenImage as error:
        print(error)
"""


def test_what_a_package_would_read_is_named_with_its_extra(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed: pip install 'clove-hub[heic]'")
    pytest.importorskip("pillow_jxl", reason="pillow-jxl-plugin is not installed: pip install 'clove-hub[jxl]'")
    heif.register_heif_opener()
    for name, kind in (("a.jpg", "HEIF"), ("b.jpg", "JXL"), ("c.HEIC", "HEIF"), ("d.heif", "HEIF"), ("e.jxl", "JXL")):
        (tmp_path / name).write_bytes(encoded(picture(), kind))
    assert find_images(tmp_path).tally.taken.total() == 5
    found = subprocess.run([sys.executable, "-c", WITHOUT, tmp_path], capture_output=True, text=True, check=True)
    lines = found.stdout.splitlines()
    assert lines[0] == (
        "2 images (2 .jpg); left out: 1 .heic (needs pip install 'clove-hub[heic]'), "
        "1 .heif (needs pip install 'clove-hub[heic]'), 1 .jxl (needs pip install 'clove-hub[jxl]')"
    )
    assert lines[1].endswith("a.jpg: a HEIC image, which needs pip install 'clove-hub[heic]'")
    assert lines[2].endswith("b.jpg: a JPEG XL image, which needs pip install 'clove-hub[jxl]'")
