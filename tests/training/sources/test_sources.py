"""Folders and tar shards: sources find the images there are and say what is missing."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import files, jpeg

from clove_hub.training import recipe
from clove_hub.training.sources import BrokenImage, DataSettings, Encoded, Source, Stream, open_source
from clove_hub.training.sources import shards as shards_module

# ---- settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": ""}, "data.path is empty"),
        ({"path": "x", "source": "zip"}, "data.source='zip'.*folder, huggingface, shards"),
        ({"path": "x", "workers": -1}, "data.workers=-1"),
        ({"path": "x", "source": "huggingface", "streaming": True, "length": 0}, "data.length=0"),
        ({"path": "x", "streaming": True}, "data.streaming is for data.source=huggingface"),
        ({"path": "x", "length": 5}, "data.length is for data.streaming=true"),
        ({"path": "x", "subset": "a"}, "data.subset is for data.source=huggingface"),
        ({"path": "x", "source": "huggingface", "streaming": True, "cache": True}, "data.cache keeps .*streaming=true"),
        ({"path": "x", "draft": 0}, "data.draft=0"),
        ({"path": ()}, "data.path is empty"),
        ({"path": ("x", "")}, "data.path is empty"),
        ({"path": ("x", "y"), "source": "shards"}, r"data.path=\['x', 'y'\].*not for 'shards'.*one path"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSettings(**values)


# ---- folder ----------------------------------------------------------------------------------------------


def from_folder(*paths: Path) -> Source:
    source = open_source(DataSettings(str(paths[0]) if len(paths) == 1 else tuple(map(str, paths))))
    assert not isinstance(source, Stream)
    return source


def names(source: Source) -> list[str]:
    return [source.read(index).name for index in range(len(source))]


def test_a_folder_is_read_at_any_depth_in_the_order_of_its_paths(tmp_path: Path) -> None:
    root = files(tmp_path / "photos", "b.JPEG", "a/z.png", "a/deep/er/1.jpg", "a.webp")
    source = from_folder(root)
    assert names(source) == ["a.webp", "a/deep/er/1.jpg", "a/z.png", "b.JPEG"]
    assert source.read(1) == Encoded("a/deep/er/1.jpg", jpeg(2))
    assert source.name == "photos"


def test_other_files_and_hidden_ones_are_not_images(tmp_path: Path) -> None:
    root = files(tmp_path / "photos", "a.jpg", "notes.txt", "._a.jpg", ".thumbs/a.jpg", "labels.csv")
    assert names(from_folder(root)) == ["a.jpg"]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    root = files(tmp_path / "photos", "a.jpg")
    files(tmp_path / "elsewhere", "b.jpg")
    (root / "more").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    assert names(from_folder(root)) == ["a.jpg", "more/b.jpg"]


def test_a_file_name_that_is_not_text_is_read_and_can_be_printed(tmp_path: Path) -> None:
    root = files(tmp_path / "photos", "a.jpg")
    with open(os.path.join(os.fsencode(root), b"caf\xe9.jpg"), "wb") as file:
        file.write(jpeg(1))
    source = from_folder(root)
    assert source.read(1) == Encoded("caf\\xe9.jpg", jpeg(1))
    source.read(1).name.encode("utf-8")


def test_an_image_that_vanished_is_broken_not_an_accident(tmp_path: Path) -> None:
    source = from_folder(files(tmp_path / "photos", "a.jpg", "b.jpg"))
    (tmp_path / "photos" / "b.jpg").unlink()
    with pytest.raises(BrokenImage, match=r"b.jpg: cannot be read: No such file"):
        source.read(1)


def test_an_index_outside_the_folder_is_refused(tmp_path: Path) -> None:
    source = from_folder(files(tmp_path / "photos", "a.jpg"))
    for index in (-1, 1):
        with pytest.raises(IndexError):
            source.read(index)


def test_a_missing_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.path='.*nowhere' does not exist"):
        from_folder(tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "set.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a file.*data.source=shards"):
        from_folder(tmp_path / "set.tar")


def test_a_folder_without_images_says_what_was_looked_for_and_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no image.*\.jpeg, \.jpg.*found no file at all"):
        from_folder(tmp_path)
    files(tmp_path, "a.txt", "b.txt", "c/d.tar")
    with pytest.raises(ValueError, match=r"found 2 .txt, 1 .tar\..*data.source=shards"):
        from_folder(tmp_path)


def test_a_folder_of_parquet_files_points_to_the_right_source(tmp_path: Path) -> None:
    files(tmp_path, "train.parquet")
    with pytest.raises(ValueError, match=r"data.source=huggingface"):
        from_folder(tmp_path)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = files(tmp_path / "photos", "a.jpg", "locked/b.jpg")
    listed = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"locked.*Permission denied"):
        from_folder(root)


def test_a_fingerprint_tells_what_is_there_but_not_where(tmp_path: Path) -> None:
    first = from_folder(files(tmp_path / "one", "a.jpg", "b.jpg")).fingerprint
    assert len(first) == 64
    assert from_folder(files(tmp_path / "two", "a.jpg", "b.jpg")).fingerprint == first
    assert from_folder(files(tmp_path / "renamed", "a.jpg", "c.jpg")).fingerprint != first
    assert from_folder(files(tmp_path / "more", "a.jpg", "b.jpg", "c.jpg")).fingerprint != first
    (tmp_path / "two" / "b.jpg").write_bytes(jpeg(5))
    assert from_folder(tmp_path / "two").fingerprint != first


def test_any_image_of_another_size_changes_the_fingerprint_and_its_date_does_not(tmp_path: Path) -> None:
    """Also those between the sixteen whose bytes are read: of forty photos twenty-four."""
    root = files(tmp_path / "photos", *(f"{number:02}.jpg" for number in range(40)))
    first = from_folder(root).fingerprint
    sampled = set(np.linspace(0, 39, 16).astype(int).tolist())
    for number in range(40):
        photo = root / f"{number:02}.jpg"
        os.utime(photo, (number, number))
        assert from_folder(root).fingerprint == first
        if number not in sampled:
            whole = photo.read_bytes()
            photo.write_bytes(whole + b"x")
            assert from_folder(root).fingerprint != first
            photo.write_bytes(whole)
    shutil.copytree(root, tmp_path / "elsewhere")
    assert from_folder(tmp_path / "elsewhere").fingerprint == first


def test_several_folders_are_one_source_in_the_order_in_which_they_are_given(tmp_path: Path) -> None:
    train = files(tmp_path / "train", "z.jpg", "a.jpg")
    unlabeled = files(tmp_path / "unlabeled", "a.jpg", "b/c.jpg", "m.jpg")
    source = from_folder(train, unlabeled)
    assert source.name == "train+unlabeled"
    assert names(source) == [f"{train}/{n}" for n in ("a.jpg", "z.jpg")] + [
        f"{unlabeled}/{n}" for n in ("a.jpg", "b/c.jpg", "m.jpg")
    ]
    assert [source.read(index).data for index in range(5)] == [jpeg(number) for number in (1, 0, 0, 1, 2)]
    assert [image.rsplit("/")[-1] for image in names(from_folder(unlabeled, train))][:3] == ["a.jpg", "c.jpg", "m.jpg"]
    assert sorted(source.order(0, 0)) == list(range(5))
    for index in (-1, 5):
        with pytest.raises(IndexError):
            source.read(index)
    (unlabeled / "m.jpg").unlink()
    with pytest.raises(BrokenImage, match=r"unlabeled/m.jpg: cannot be read"):
        source.read(4)


def test_a_recipe_takes_one_folder_or_a_list_from_a_file_and_from_the_command_line() -> None:
    def path(override: str) -> object:
        loaded = recipe.load("slotcon_r50_cocoplus_800ep", [override])
        assert recipe.parse(recipe.as_sections(loaded)) == loaded
        return loaded.data.path

    assert path("data.path=[a, b/c]") == ("a", "b/c")
    assert path("data.path=a") == "a"
    assert path("data.path=3") == "3"
    assert path("data.path=[a, 2024]") == ("a", "2024")
    for wrong, message in {
        "data.path=": "data.path is empty",
        "data.path=[]": "data.path is empty",
    }.items():
        with pytest.raises(ValueError, match=message):
            path(wrong)


def test_one_folder_in_a_list_is_that_folder(tmp_path: Path) -> None:
    root = files(tmp_path / "photos", "a.jpg", "b.jpg")
    listed = open_source(DataSettings((str(root),)))
    assert isinstance(listed, type(from_folder(root)))
    assert listed.fingerprint == from_folder(root).fingerprint
    assert names(listed) == ["a.jpg", "b.jpg"]


def test_the_fingerprint_of_several_folders_covers_all_and_where_each_begins(tmp_path: Path) -> None:
    def written(name: str) -> tuple[Path, Path]:
        return files(tmp_path / name / "one", "a.jpg", "b.jpg"), files(tmp_path / name / "two", "c.jpg", "d.jpg")

    one, two = written("first")
    first = from_folder(one, two).fingerprint
    assert from_folder(*written("copy")).fingerprint == first
    assert from_folder(two, one).fingerprint != first
    for folder in written("changed"):
        (folder / "e.jpg").write_bytes(jpeg(3))
        assert from_folder(*(other.parents[1] / "changed" / other.name for other in (one, two))).fingerprint != first
        (folder / "e.jpg").unlink()
    moved_one, moved_two = written("moved")  # the same names and pictures in the same order, but for the border
    (moved_two / "c.jpg").rename(moved_one / "c.jpg")
    assert from_folder(moved_one, moved_two).fingerprint != first


def test_of_several_folders_the_wrong_one_is_named(tmp_path: Path) -> None:
    good = files(tmp_path / "good", "a.jpg")
    with pytest.raises(ValueError, match=r"data.path='[^']*nowhere' does not exist"):
        from_folder(good, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data.path='[^']*empty' holds no image"):
        from_folder(tmp_path / "empty", good)


@pytest.mark.parametrize("first", ["whole", "part"])
def test_folders_that_would_count_images_twice_are_refused(tmp_path: Path, first: str) -> None:
    whole = files(tmp_path / "whole", "a.jpg", "part/b.jpg")
    with pytest.raises(ValueError, match=r"'[^']*whole' and '[^']*whole' both lead to '[^']*whole'.*twice"):
        from_folder(whole, whole)
    both = [whole, whole / "part"] if first == "whole" else [whole / "part", whole]
    with pytest.raises(ValueError, match=r"both lead to '[^']*whole/part'.*twice.*leave one"):
        from_folder(*both)
    (tmp_path / "linked").symlink_to(whole)
    with pytest.raises(ValueError, match=r"both lead to"):
        from_folder(tmp_path / "linked", whole / "part")
    beside = files(tmp_path / "whole2", "a.jpg")  # a name that begins alike is another folder
    assert len(from_folder(whole, beside)) == 3


# ---- tar shards ------------------------------------------------------------------------------------------


def shard(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(number: int) -> dict[str, bytes]:
    return {f"{number:06}.jpg": jpeg(number), f"{number:06}.cls": b"3", f"{number:06}.json": b"{}"}


def shards(folder: Path, count: int = 3, each: int = 2) -> Path:
    for number in range(count):
        members = {k: v for i in range(each) for k, v in sample(number * each + i).items()}
        shard(folder / f"train-{number:03}.tar", members)
    return folder


def from_shards(pattern: Path | str, column: str = "image") -> Source:
    source = open_source(DataSettings(str(pattern), source="shards", column=column))
    assert not isinstance(source, Stream)
    return source


@pytest.mark.parametrize("pattern", ["", "train-{000..002}.tar", "train-00{0,1,2}.tar", "train-*.tar"])
def test_shards_are_found_by_folder_braces_and_wildcards(tmp_path: Path, pattern: str) -> None:
    source = from_shards(shards(tmp_path / "set") / pattern)
    assert len(source) == 6
    assert source.read(5) == Encoded("train-002.tar/000005.jpg", jpeg(5))
    assert [source.read(index).data for index in range(6)] == [jpeg(index) for index in range(6)]


def test_a_single_shard_and_part_of_a_set_can_be_read(tmp_path: Path) -> None:
    folder = shards(tmp_path)
    assert len(from_shards(folder / "train-001.tar")) == 2
    assert names(from_shards(folder / "train-{001..002}.tar"))[0] == "train-001.tar/000002.jpg"


def test_long_member_names_and_folders_inside_a_shard_are_read(tmp_path: Path) -> None:
    long = "folder/" + "x" * 150 + ".jpg"
    source = from_shards(shard(tmp_path / "a.tar", {long: jpeg(1), "folder/2.png": jpeg(2)}))
    assert source.read(0) == Encoded(f"a.tar/{long}", jpeg(1))
    assert source.read(1).data == jpeg(2)


def test_a_sample_with_several_images_needs_a_column(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {"1.jpg": jpeg(1), "1.seg.png": jpeg(2), "2.jpg": jpeg(3)})
    with pytest.raises(ValueError, match=r"sample '1' \(jpg, seg.png\).*data.column=jpg"):
        from_shards(path)
    assert names(from_shards(path, "jpg")) == ["a.tar/1.jpg", "a.tar/2.jpg"]
    assert names(from_shards(path, "seg.png")) == ["a.tar/1.seg.png"]
    with pytest.raises(ValueError, match=r"no member ending in .webp in 1 tar files; .*jpg, seg.png"):
        from_shards(path, "webp")


def test_a_shard_without_images_says_what_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no image in 1 tar files; their members end in cls, json"):
        from_shards(shard(tmp_path / "a.tar", {"1.cls": b"1", "1.json": b"{}"}))
    with pytest.raises(ValueError, match="they have no members"):
        from_shards(shard(tmp_path / "b.tar", {}))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("train-{000..004}.tar", r"2 of 5 tar files do not exist, first '.*train-003.tar'"),
        ("nothing-*.tar", "matches no file"),
        ("empty", "without a .tar file"),
        ("train-{3..1}.tar", "must begin with its smaller number"),
    ],
)
def test_shards_that_are_not_there_are_an_error(tmp_path: Path, pattern: str, message: str) -> None:
    shards(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        from_shards(tmp_path / pattern)


def test_shards_behind_an_address_point_to_streaming() -> None:
    with pytest.raises(ValueError, match=r"data.streaming=true"):
        from_shards("https://example.org/{000..099}.tar")


def test_a_compressed_or_damaged_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    packed = shard(tmp_path / "packed.tar", sample(1), "w:gz")
    with pytest.raises(ValueError, match=r"packed.tar.*unpack it once"):
        from_shards(packed)
    torn = shard(tmp_path / "torn.tar", {"1.jpg": jpeg(1), "2.jpg": b"x" * 5000})
    torn.write_bytes(torn.read_bytes()[:4000])
    with pytest.raises(ValueError, match=r"torn.tar.*copy it again"):
        from_shards(torn)


def test_the_fingerprint_of_shards_follows_their_images(tmp_path: Path) -> None:
    first = from_shards(shards(tmp_path / "a")).fingerprint
    assert from_shards(shards(tmp_path / "b")).fingerprint == first
    assert from_shards(shards(tmp_path / "c", count=2)).fingerprint != first


def test_a_block_of_a_shard_is_fetched_as_a_whole_with_the_first_of_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "_BLOCK", 8192)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, __: asked.append((start, size)), raising=False)
    source = from_shards(shards(tmp_path, count=2, each=12))
    expected = [jpeg(number) for number in range(24)]
    assert len(source.blocks) >= 6
    assert [source.read(index).data for index in range(24)] == expected
    assert len(asked) == len(source.blocks)
    # All that is between the first byte of a block's first image and the last of its last, and nothing else.
    ends = [*source.blocks[1:].tolist(), 24]
    for (start, size), first, end in zip(asked, source.blocks.tolist(), ends, strict=True):
        assert start == source.offsets[first]
        assert start + size == source.offsets[end - 1] + source.sizes[end - 1]
        assert source.offsets[end - 1] < source.offsets[first] // 8192 * 8192 + 8192
    assert [source.read(index).data for index in range(24)] == expected
    assert len(asked) == len(source.blocks)


def test_blocks_never_reach_across_shards(tmp_path: Path) -> None:
    source = from_shards(shards(tmp_path, count=3, each=2))
    assert source.blocks.tolist() == [0, 2, 4]
    assert sorted(source.order(0, 0).tolist()) == list(range(6))
