"""A data set of the Hugging Face `datasets` library: from the Hub, files or `save_to_disk`, or streamed."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from clove_hub.data.finder import ABSENT, size_of
from clove_hub.data.images import BrokenImage
from clove_hub.views import Purpose, stream

from ..settings import DataSettings
from .source import Encoded, Pending, fingerprint, pending, shuffled

_T = TypeVar("_T")

_SPARE_TRIES = 100  # images at the beginning of a stream, one of which must be good
_SHARDS_OF_A_SAVED_TABLE = 64  # pieces whose order is shuffled when a table on disk is read as a stream
_BUFFER = 1000  # images among which the next one is drawn, held in memory as they are stored
_LOOKED_AT = 10_000  # rows of a table whose sizes are looked up at once
_OPEN_FILES = 8  # read in turn, because the images of one file are often of one kind


@dataclass(frozen=True)
class Table:
    """A data set with random access. `rows` is a `datasets.Dataset` with one column, not decoded."""

    name: str
    rows: Any
    column: str
    split: str

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(len(self), (stored_sizes(self.rows, self.column),), self.read)

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        return shuffled(seed, epoch, len(self))

    def read(self, index: int) -> Encoded:
        """Reads row `index`; raises `BrokenImage` where it holds no image that can be read."""
        return pending(self.rows[index][self.column], f"{self.split}[{index}]").read()


@dataclass(frozen=True)
class Stream:
    """A data set that is read from front to back: an image cannot be asked for by its number.

    `rows` is a `datasets.IterableDataset` with one column, not decoded; `length` is the number of images in
    an epoch; `spare` is the first image that can be decoded, which takes the place of those that cannot; `sizes` are
    those of the images, or else of the files that hold them, as far as they lie here: (images or files,).
    """

    name: str
    rows: Any
    column: str
    length: int
    spare: Encoded
    sizes: NDArray[np.int64]

    @cached_property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that change with the number of images, the first good one, and the sizes."""
        return fingerprint(self.length, (self.sizes,), lambda _: self.spare)

    def __len__(self) -> int:
        return self.length

    def walk(self, seed: int, epoch: int) -> Iterator[Pending]:
        """Iterate once over the images, in an order that depends only on (seed, epoch).

        The shuffling of `datasets` is not used: its order changes with its version, and a run must resume.
        """
        files = range(self.rows.num_shards)
        shuffled = [files[at] for at in stream(seed, epoch, 0, Purpose.ORDER).random(len(files)).argsort()]
        opened = (iter(self.rows.shard(len(files), file)) for file in shuffled)
        draws = stream(seed, epoch, 1, Purpose.ORDER)
        for position, row in enumerate(buffered(in_turn(opened, _OPEN_FILES), draws, _BUFFER)):
            yield pending(row[self.column], f"epoch {epoch}, image {position}")


def in_turn(iterators: Iterable[Iterator[_T]], at_once: int) -> Iterator[_T]:
    """One item of each of the first `at_once` iterators in turn; where one ends the next takes its place."""
    waiting = iter(iterators)
    open_now = deque(islice(waiting, at_once))
    while open_now:
        iterator = open_now.popleft()
        try:
            item = next(iterator)
        except StopIteration:
            open_now.extendleft(islice(waiting, 1))
        else:
            open_now.append(iterator)
            yield item


def buffered(items: Iterator[_T], draws: np.random.Generator, size: int) -> Iterator[_T]:
    """Shuffles through a buffer: each item that comes in pushes a random one of the `size` before it out."""
    buffer = list(islice(items, size))
    for item in items:
        at = int(draws.random() * size)
        yield buffer[at]
        buffer[at] = item
    for at in draws.random(len(buffer)).argsort(kind="stable"):
        yield buffer[at]


def open_dataset(settings: DataSettings) -> Table | Stream:
    """Opens a data set by its id or path.

    A path is a folder written by `save_to_disk`, a folder of Parquet, Arrow, image or other files that
    `datasets` knows, or one such file. The column holds images, their encoded bytes, or paths.

    Raises:
        ValueError: there is no such data set, split or column, the column holds something else, there is no
            row, or a stream's length is not known or larger than the data set.
    """
    rows = _load(settings)
    if hasattr(rows, "__len__"):
        known: int | None = len(rows)
    else:  # a stream, of a data set that may say so
        split = (rows.info.splits or {}).get(settings.split)
        known = (split.num_examples or None) if split else None
    if known == 0:  # so far `datasets` itself raises first, with an error for each kind
        raise ValueError(f"{_where(settings)} has no rows")
    rows = _pick_column(rows, settings)
    if settings.streaming and hasattr(rows, "to_iterable_dataset"):
        sizes = stored_sizes(rows, settings.column)
        rows = rows.to_iterable_dataset(num_shards=min(len(rows), _SHARDS_OF_A_SAVED_TABLE))
    elif settings.streaming:
        sizes = _file_sizes(settings)
    path = Path(settings.only_path).expanduser()
    name = path.resolve().name if path.exists() else settings.only_path
    if not settings.streaming:
        return Table(name, rows, settings.column, settings.split)
    length = settings.length or known
    if length is None:
        raise ValueError(
            f"{_where(settings)} does not say how many images it has, which decides how long an epoch is: set data.length to "
            "their number"
        )
    if known is not None and length > known:
        raise ValueError(f"data.length={length}, but {_where(settings)} has {known} images")
    return Stream(name, rows, settings.column, length, _spare(rows, settings), sizes)


def stored_sizes(rows: Any, column: str) -> NDArray[np.int64]:
    """Bytes of each image (images,), of which none is read: a table says where each begins, of a path the disk knows it.

    Args:
        rows: a `datasets.Dataset` whose column is not decoded.
    """
    import pyarrow.compute as arrow  # type: ignore[import-untyped]

    found = [np.zeros(0, dtype=np.int64)]
    for table in rows.with_format("arrow").iter(_LOOKED_AT):
        for cells in table.column(column).chunks:
            kind = str(cells.type)
            parts = {field.name: cells.field(field.name) for field in cells.type} if kind.startswith("struct") else {}
            paths = cells if "string" in kind and not parts else parts.get("path")
            data = parts.get("bytes") if parts else cells if paths is None else None
            sizes = np.zeros(len(cells), dtype=np.int64)
            if data is not None:
                sizes[:] = arrow.binary_length(data).fill_null(0).to_numpy(zero_copy_only=False)
            if paths is not None and len(elsewhere := np.flatnonzero(sizes == 0)):
                sizes[elsewhere] = [_size_at(path) for path in paths.take(elsewhere).to_pylist()]
            found.append(sizes)
    return np.concatenate(found)


def _size_at(path: str | None) -> int:
    return ABSENT if path is None or "://" in path else size_of(Path(path))


def _file_sizes(settings: DataSettings) -> NDArray[np.int64]:
    """Bytes of each file that a data set is read from; none of a data set that does not lie here."""
    import datasets

    if not Path(settings.only_path).expanduser().exists():
        return np.zeros(0, dtype=np.int64)
    files = datasets.load_dataset_builder(**_place(settings), name=settings.subset).config.data_files or {}
    return np.array([_size_at(str(file)) for file in files.get(settings.split, ())], dtype=np.int64)


def _spare(rows: Any, settings: DataSettings) -> Encoded:
    """The first image of the stream that can be decoded."""
    problems: list[BrokenImage] = []
    for position, row in enumerate(islice(rows, _SPARE_TRIES)):
        try:
            encoded = pending(row[settings.column], f"image {position}").read()
            settings.reading.decode(encoded.data, encoded.name)
        except BrokenImage as broken:
            problems.append(broken)
        else:
            return encoded
    if not problems:
        raise ValueError(f"{_where(settings)} has no rows")
    raise ValueError(
        f"{_where(settings)}: none of the first {len(problems)} images of data.column={settings.column!r} "
        f"can be decoded; first {problems[0]}"
    )


def _pick_column(rows: Any, settings: DataSettings) -> Any:
    """Leaves only the images, as bytes: decoding is ours, and other columns need not be read."""
    import datasets

    features = rows.features
    # A stream of files may have no schema: its first row has the names.
    columns: list[str] = list(next(iter(rows), ()) if features is None else features)
    if not columns:
        raise ValueError(f"{_where(settings)} has no rows")
    column = settings.column
    if column not in columns:
        raise ValueError(
            f"data.column={column!r} is not a column of {_where(settings)}; its columns are {', '.join(columns)}"
        )
    if features is None:
        return rows.select_columns([column])
    feature = features[column]
    if isinstance(feature, datasets.Image):
        return rows.cast_column(column, datasets.Image(decode=False)).select_columns([column])
    holds_bytes = isinstance(feature, datasets.Value) and "binary" in feature.dtype
    holds_paths = isinstance(feature, datasets.Value) and "string" in feature.dtype
    if not (holds_bytes or holds_paths or (isinstance(feature, dict) and feature.keys() & {"bytes", "path"})):
        images = [other for other in columns if isinstance(features[other], datasets.Image)]
        way_out = f"; the columns with images are {', '.join(images)}" if images else ""
        raise ValueError(f"data.column={column!r} of {_where(settings)} holds {feature}, not images{way_out}")
    return rows.select_columns([column])


def _load(settings: DataSettings) -> Any:
    """A `datasets.Dataset` or `datasets.IterableDataset`."""
    import datasets

    path = Path(settings.only_path).expanduser()
    if not path.exists() and (
        path.is_absolute() or settings.only_path.startswith(".") or settings.only_path.count("/") > 1
    ):
        raise ValueError(
            f"data.path={settings.only_path!r} does not exist; data.source=huggingface needs the path of a "
            "data set or its id on the Hub (name or organization/name)"
        )
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            saved = datasets.load_from_disk(str(path))
        except Exception as error:  # files that are missing or damaged, in whatever way
            raise ValueError(f"{_where(settings)} was written by save_to_disk and cannot be read: {error}") from error
        splits = dict(saved) if isinstance(saved, datasets.DatasetDict) else {str(saved.split or settings.split): saved}
        if settings.split not in splits:
            raise ValueError(
                f"data.split={settings.split!r} is not in data.path={settings.only_path!r}; it has {', '.join(splits)}"
            )
        return splits[settings.split]
    try:
        return datasets.load_dataset(
            **_place(settings), name=settings.subset, split=settings.split, streaming=settings.streaming
        )
    except Exception as error:  # the library raises many kinds for a wrong id, split, subset or file
        raise ValueError(
            f"{_where(settings)} (data.subset={settings.subset!r}) cannot be opened as a data set: {error}"
        ) from error


def _place(settings: DataSettings) -> dict[str, str]:
    """What `datasets` is told of where a data set is."""
    path = Path(settings.only_path).expanduser()
    if path.is_file():
        return {"path": str(path.parent), "data_files": path.name}
    return {"path": str(path) if path.is_dir() else settings.only_path}


def _where(settings: DataSettings) -> str:
    return f"data.path={settings.only_path!r} (data.split={settings.split!r})"
