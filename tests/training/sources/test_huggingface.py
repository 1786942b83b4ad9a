"""Data sets of Hugging Face, in every form in which one has them: found, read, streamed, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from pictures import files, jpeg

from clove_hub.training.sources import BrokenImage, DataSettings, Encoded, Source, Stream, open_source
from clove_hub.training.sources.huggingface import buffered, in_turn


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No data set may be found in, or left behind in, the cache of whoever runs the tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def rows(count: int = 10) -> object:
    """A data set with an image column and others, one of them images too."""
    cells = [{"bytes": jpeg(number), "path": f"{number}.jpg"} for number in range(count)]
    columns = {"image": cells, "label": list(range(count)), "mask": cells}
    kinds = {"image": datasets.Image(), "label": datasets.Value("int64"), "mask": datasets.Image()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def as_parquet(folder: Path) -> Path:
    folder.mkdir()
    for part in range(2):
        piece = rows().shard(2, part, contiguous=True)
        piece.to_parquet(folder / f"train-{part:05}-of-00002.parquet")
    return folder


def as_arrow(folder: Path) -> Path:
    from datasets.arrow_writer import ArrowWriter

    folder.mkdir()
    table = rows()
    with ArrowWriter(path=str(folder / "train.arrow"), features=table.features) as writer:
        writer.write_table(table.data.table)
        writer.finalize()
    return folder


def as_saved(folder: Path) -> Path:
    rows().save_to_disk(folder)
    return folder


def as_saved_splits(folder: Path) -> Path:
    datasets.DatasetDict(train=rows(), validation=rows(3)).save_to_disk(folder)
    return folder


def as_images(folder: Path) -> Path:
    return files(folder, *(f"kind{number % 2}/{number}.jpg" for number in range(10)))


def as_bytes(folder: Path) -> Path:
    folder.mkdir()
    cells = datasets.Dataset.from_dict({"image": [jpeg(number) for number in range(10)]})
    cells.to_parquet(folder / "train.parquet")
    return folder


def as_one_file(folder: Path) -> Path:
    folder.mkdir()
    rows().to_parquet(folder / "everything.parquet")
    return folder / "everything.parquet"


def as_paths(folder: Path) -> Path:
    images = as_images(folder / "images")
    (folder / "table").mkdir()
    cells = {"image": [str(path) for path in sorted(images.rglob("*.jpg"))]}
    datasets.Dataset.from_dict(cells).to_parquet(folder / "table" / "train.parquet")
    return folder / "table"


EVERY_FORM = [as_parquet, as_arrow, as_saved, as_saved_splits, as_images, as_bytes, as_one_file, as_paths]


def table(path: Path | str, **settings: object) -> Source:
    source = open_source(DataSettings(str(path), source="huggingface", **settings))
    assert not isinstance(source, Stream)
    return source


def row_stream(path: Path | str, **settings: object) -> Stream:
    chosen = DataSettings(str(path), source="huggingface", streaming=True, **settings)
    source = open_source(chosen)
    assert isinstance(source, Stream)
    return source


@pytest.mark.parametrize("write", EVERY_FORM)
def test_a_data_set_gives_the_bytes_of_its_images(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    source = table(write(tmp_path / "set"))
    assert len(source) == 10
    assert {source.read(index).data for index in range(10)} == {jpeg(index) for index in range(10)}
    assert source.read(3) == source.read(3)
    assert source.read(3).name.startswith("train[3]")


@pytest.mark.parametrize("write", EVERY_FORM)
def test_a_stream_gives_every_image_once_in_an_order_of_seed_and_epoch(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    source = row_stream(write(tmp_path / "set"), length=10)
    assert len(source) == 10

    def walked(seed: int, epoch: int) -> list[bytes]:
        return [image.read().data for image in source.walk(seed, epoch)]

    assert sorted(walked(0, 0)) == sorted(jpeg(index) for index in range(10))
    assert walked(0, 0) == walked(0, 0)
    assert walked(0, 1) != walked(0, 0)
    assert walked(1, 0) != walked(0, 0)


def test_the_order_of_a_stream_goes_across_its_files_and_beyond_a_small_buffer() -> None:
    """Five files of ten items each, through a buffer of eight: neighbors come from different files."""
    iterators = [iter(range(10 * file, 10 * file + 10)) for file in range(5)]
    turned = list(in_turn(iterators, 3))
    assert sorted(turned) == list(range(50))
    assert turned[:6] == [0, 10, 20, 1, 11, 21]
    shuffled = list(buffered(iter(turned), np.random.default_rng(0), 8))
    assert sorted(shuffled) == list(range(50))
    assert shuffled != turned
    assert max(turned.index(item) - at for at, item in enumerate(shuffled)) <= 8
    assert list(buffered(iter([]), np.random.default_rng(0), 8)) == []


def test_the_files_of_a_stream_come_in_an_order_of_seed_and_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a buffer, one file at a time: the first image tells which file comes first."""
    monkeypatch.setattr("clove_hub.training.sources.huggingface._BUFFER", 1)
    monkeypatch.setattr("clove_hub.training.sources.huggingface._OPEN_FILES", 1)
    source = row_stream(as_saved(tmp_path / "set"))
    firsts = [next(source.walk(seed, epoch)).data for seed, epoch in [(0, 0)] * 2 + [(0, e) for e in range(1, 9)]]
    assert firsts[0] == firsts[1]
    assert len(set(firsts)) > 3
    assert len({next(source.walk(seed, 0)).data for seed in range(8)}) > 3


def test_a_stream_knows_its_length_where_the_data_set_does(tmp_path: Path) -> None:
    path = as_saved(tmp_path / "set")
    assert len(row_stream(path)) == 10
    assert len(row_stream(path, length=6)) == 6
    with pytest.raises(ValueError, match=r"data.length=11, but .* has 10 images"):
        row_stream(path, length=11)


def test_a_stream_of_unknown_length_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set data.length"):
        row_stream(as_parquet(tmp_path / "set"))


def test_the_spare_of_a_stream_is_its_first_good_image(tmp_path: Path) -> None:
    cells = [b"torn", None, jpeg(2), jpeg(3)]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"image": cells}).to_parquet(tmp_path / "set" / "train.parquet")
    assert row_stream(tmp_path / "set", length=4).spare.data == jpeg(2)


def test_a_stream_without_a_good_image_is_an_error_at_start(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"image": [b"torn", b""]}).to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(ValueError, match=r"none of the first 2 images.*not an image"):
        row_stream(tmp_path / "set", length=2)


def test_a_row_without_an_image_is_broken(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"image": [jpeg(0), None]}).to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(BrokenImage, match=r"train\[1\]: the row holds no image"):
        table(tmp_path / "set").read(1)


def test_an_image_behind_an_address_is_fetched_or_broken() -> None:
    fsspec = pytest.importorskip("fsspec")
    from clove_hub.training.sources import Pending

    with fsspec.open("memory://album/1.jpg", "wb") as file:
        file.write(jpeg(1))
    assert Pending("one", None, "memory://album/1.jpg").read() == Encoded("one", jpeg(1))
    with pytest.raises(BrokenImage, match="two: cannot be read"):
        Pending("two", None, "memory://album/2.jpg").read()


@pytest.mark.parametrize("open_it", [table, row_stream])
@pytest.mark.parametrize("write", [as_parquet, as_saved_splits])
def test_a_wrong_split_names_those_there_are(
    tmp_path: Path, write: Callable[[Path], Path], open_it: Callable[..., object]
) -> None:
    with pytest.raises(ValueError, match=r"data.split='nope'.*train"):
        open_it(write(tmp_path / "set"), split="nope")


@pytest.mark.parametrize("open_it", [table, row_stream])
def test_a_wrong_column_names_those_there_are(tmp_path: Path, open_it: Callable[..., object]) -> None:
    path = as_parquet(tmp_path / "set")
    with pytest.raises(ValueError, match=r"data.column='picture'.*image, label, mask"):
        open_it(path, column="picture")
    with pytest.raises(ValueError, match=r"data.column='label'.*int64.*image, mask"):
        open_it(path, column="label")


def test_another_split_and_column_can_be_chosen(tmp_path: Path) -> None:
    source = table(as_saved_splits(tmp_path / "set"), split="validation", column="mask")
    assert len(source) == 3
    assert source.read(2).data == jpeg(2)


@pytest.mark.parametrize(
    ("open_it", "no_rows"), [(table, "no data"), (lambda path: row_stream(path, length=2), "has no rows")]
)
def test_a_data_set_that_is_missing_or_empty_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_it: Callable[..., object], no_rows: str
) -> None:
    with pytest.raises(ValueError, match=r"nowhere' does not exist"):
        open_it(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty'.*cannot be opened"):
        open_it(tmp_path / "empty")
    (tmp_path / "no-rows").mkdir()
    rows(0).to_parquet(tmp_path / "no-rows" / "train.parquet")
    with pytest.raises(ValueError, match=rf"no-rows'.*{no_rows}"):
        open_it(tmp_path / "no-rows")
    monkeypatch.setattr(datasets, "load_from_disk", lambda path: rows(0))
    (tmp_path / "no-rows" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no-rows'.*has no rows"):
        open_it(tmp_path / "no-rows")


def test_an_unknown_data_set_of_the_hub_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"data.path='nobody/nothing'.*cannot be opened"):
        table("nobody/nothing")


def test_the_fingerprint_of_a_data_set_is_the_same_in_every_form(tmp_path: Path) -> None:
    first = table(as_parquet(tmp_path / "a")).fingerprint
    assert table(as_saved(tmp_path / "b")).fingerprint == first
    assert table(as_saved_splits(tmp_path / "c"), split="validation").fingerprint != first


@pytest.mark.parametrize(
    ("opened", "write"),
    [
        *((table, write) for write in EVERY_FORM),
        # A stream of paths would have to be read for its images' sizes.
        *((lambda path: row_stream(path, length=10), write) for write in EVERY_FORM if write is not as_paths),
    ],
)
def test_an_image_of_another_size_changes_the_fingerprint(
    tmp_path: Path,
    opened: Callable[[Path], Source | Stream],
    write: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of ten images the sampled bytes are left out, as those of most images of a large set are."""
    monkeypatch.setattr("clove_hub.training.sources.source._SAMPLED_IMAGES", 0)
    first = opened(write(tmp_path / "a")).fingerprint
    assert opened(write(tmp_path / "b")).fingerprint == first
    replaced = {number: jpeg(number) + bytes(1000 if number == 3 else 0) for number in range(10)}
    monkeypatch.setitem(globals(), "jpeg", replaced.__getitem__)
    monkeypatch.setattr("pictures.jpeg", replaced.__getitem__)
    assert opened(write(tmp_path / "c")).fingerprint != first
