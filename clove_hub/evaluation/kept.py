"""Feature maps that a protocol reads more than once, kept on disk so that memory does not grow with the images.

They are in half precision, relative to each channel's mean, in `$XDG_CACHE_HOME/clove-hub/features/` while the protocol
runs. An interrupted protocol leaves them there, and the same evaluation resumes from them; a completed one removes
them.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from clove_hub import __version__
from clove_hub.data.files import add_files
from clove_hub.data.images import BrokenImage
from clove_hub.documents import read_json
from clove_hub.runs import write_whole
from clove_hub.zoo.places import cache_folder

from ..weights.backbone import Backbone
from ..weights.weights import architecture_of, fingerprint
from .processes import gather, share, world
from .progress import tracked
from .reading import LeftOut, batches, in_threads, readable, settle, unless_broken
from .unfinished import in_words

log = logging.getLogger(__name__)

T = TypeVar("T")
_HEAD = "maps.json"
_QUIETEST = 1e-2
"""A channel is taken for one that varies at least this part of what channels vary on average."""


@dataclass(frozen=True)
class Maps:
    """Maps of one level of N images, read on access: `maps[images]` is float32 (B, C, h, w)."""

    file: Path
    shape: tuple[int, int, int]
    """(C, h, w)"""
    rows: NDArray[np.int64]
    """Where in the file each image's map lies, in maps: (N,)."""
    offset: Tensor
    """What is subtracted from each channel before it is stored: (C, 1, 1)."""
    scale: Tensor
    """What it is divided by then: (C, 1, 1)."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, images: slice | Tensor) -> Tensor:
        rows = self.rows[images if isinstance(images, slice) else images.cpu().numpy()]
        found = np.empty((len(rows), *self.shape), np.float16)
        with self.file.open("rb", buffering=0) as file:  # no memory map, whose pages would count as memory
            for row, place in zip(rows.tolist(), found, strict=True):
                file.seek(row * place.nbytes)
                if file.readinto(place.data.cast("B")) != place.nbytes:
                    raise ValueError(f"{self.file} was cut off while it was read: evaluate again")
        return torch.from_numpy(found).float().mul_(self.scale).add_(self.offset)


class Kept(NamedTuple):
    """What `kept_maps` gives."""

    levels: list[Maps]
    images: list[int]
    """The numbers of the images that can be read: (N,)."""
    left_out: LeftOut
    """The others, and why."""


@contextmanager
def kept_maps(
    backbone: Backbone,
    data: Path,
    items: Sequence[T],
    load: Callable[[T], Tensor],
    levels: Sequence[int],
    batch: int,
    *,
    photos: Sequence[Path],
    shown: str,
) -> Iterator[Kept]:
    """The feature maps of images of one size, within the context. All processes must enter it.

    Args:
        items: what is loaded, one for each image.
        load: the normalized pixels of an item, (C, H, W), whose size is the same for all.
        levels: as in `Backbone.maps`.
        batch: images at once.
        photos: the file of each image, below `data`.
        shown: how `load` shows an image, in words that change with it. Maps of another evaluation are taken for these
            where weights, preprocessing, files and this are the same.

    Raises:
        ValueError: too many of the images cannot be read, or the disk has no room for the maps.
    """
    key = features_key(backbone, data, photos, f"{shown} {list(levels)} {batch}")
    with own_folder(key) as folder:
        with in_words(folder):
            kept = _see(backbone, data, items, load, levels, batch, folder)
        yield kept


def _see(
    backbone: Backbone,
    data: Path,
    items: Sequence[T],
    load: Callable[[T], Tensor],
    levels: Sequence[int],
    batch: int,
    folder: Path,
) -> Kept:
    parts = batches(items, batch)

    def maps_of(pixels: list[Tensor]) -> list[Tensor]:
        return [level.float().cpu() for level in backbone.maps(backbone.padded(torch.stack(pixels)), levels)]

    def head() -> list[dict[str, Any]]:
        """Shape, offset and scale of each level, by the first images that can be read; makes the files."""
        if not (folder / _HEAD).exists():
            loads = (readable(one)[0] for one in in_threads(unless_broken(load), parts))
            _begin(folder, maps_of(next((good for good in loads if good), [])), len(items))
        return list(read_json(folder / _HEAD))

    def problems() -> Iterator[list[BrokenImage | None]]:
        """Sees what has not been seen; why the images of each batch could not be read."""
        own = share(range(len(parts)))
        todo = [number for number in own if not _note(folder, number).exists()]
        loads = in_threads(unless_broken(load), [parts[number] for number in todo])
        for number, loaded in zip(todo, tracked(loads, "reading the images", len(todo)), strict=True):
            good, wrong = readable(loaded)
            rows = [number * batch + place for place, reason in enumerate(wrong) if reason is None]
            for level, seen in zip(stored, maps_of(good) if good else [], strict=bool(good)):
                _store(level, seen, rows)
            told = [reason and [reason.name, reason.reason] for reason in wrong]
            write_whole(_note(folder, number), json.dumps(told))
        for number in own:
            yield [reason and BrokenImage(*reason) for reason in read_json(_note(folder, number))]

    (heads,) = gather(head() for _ in share([None]))
    stored = [_maps(folder, number, level) for number, level in enumerate(heads)]
    wrong = [reason for part in gather(problems()) for reason in part]
    left_out = settle(wrong, data)
    images = [number for number, reason in enumerate(wrong) if reason is None]
    if absent := [number for number in range(len(parts)) if not _note(folder, number).exists()]:
        raise ValueError(
            f"{folder} lacks what other processes wrote to it (batch {absent[0]}): set XDG_CACHE_HOME to a folder that all "
            "hosts share"
        )
    return Kept([replace(level, rows=np.array(images)) for level in stored], images, left_out)


# ---- the files -------------------------------------------------------------------------------------------------------


def _begin(folder: Path, maps: Sequence[Tensor], images: int) -> None:
    """Makes a file for each level, with room for the maps of so many images.

    Args:
        maps: of each level, of the first images.
    """
    needed = sum(2 * images * level[0].numel() for level in maps)
    if (free := shutil.disk_usage(folder).free) < needed:
        raise ValueError(
            f"the feature maps of {images} images need {needed / 1e9:.1f} GB on disk, and {folder} has {free / 1e9:.1f} GB: set "
            "XDG_CACHE_HOME to a folder with enough space, or lower the number of images or their size"
        )
    heads = []
    for number, level in enumerate(maps):
        spread = level.std((0, 2, 3), correction=0)
        scale = spread.clamp(min=max(_QUIETEST * float(spread.mean()), 1e-30))
        heads.append(
            {"shape": list(level.shape[1:]), "offset": level.mean((0, 2, 3)).tolist(), "scale": scale.tolist()}
        )
        with (folder / f"{number}.half").open("wb") as file:
            file.truncate(2 * images * level[0].numel())
    write_whole(folder / _HEAD, json.dumps(heads))


def _maps(folder: Path, number: int, head: Mapping[str, Any]) -> Maps:
    offset, scale = (torch.tensor(head[name]).view(-1, 1, 1) for name in ("offset", "scale"))
    channels, height, width = head["shape"]
    return Maps(folder / f"{number}.half", (channels, height, width), np.empty(0, np.int64), offset, scale)


def _store(level: Maps, maps: Tensor, rows: Sequence[int]) -> None:
    half = ((maps - level.offset) / level.scale).half()
    if not bool(half.isfinite().all()):
        raise ValueError(
            "a feature is too far from those of its channel in the first images to be stored in half precision: put other images "
            "first"
        )
    with level.file.open("r+b", buffering=0) as file:
        for row, one in zip(rows, half.contiguous().numpy(), strict=True):
            file.seek(row * one.nbytes)
            file.write(one.data.cast("B"))


def _note(folder: Path, number: int) -> Path:
    """Is there when a batch has been seen; says which of its images cannot be read, and why."""
    return folder / f"{number:06d}.json"


def features_key(backbone: Backbone, data: Path, files: Sequence[Path], shown: str) -> str:
    """Changes with whatever changes the maps."""
    model, seen = backbone.model, backbone.preprocessing
    parameter = next(model.parameters())
    strides = [
        layer.stride for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)
    ]  # a finer map has others
    weights = fingerprint(architecture_of(model), model.state_dict())
    kind = [parameter.dtype, parameter.device.type, backbone.precision]
    facts = [__version__, torch.__version__, weights, seen, *kind, strides, shown]
    digest = hashlib.sha256(repr(facts).encode())
    add_files(digest, data, files)
    digest.update(
        repr([file.stat().st_mtime_ns if file.exists() else None for file in files]).encode()
    )  # links may lead nowhere
    return digest.hexdigest()[:24]


@contextmanager
def own_folder(key: str) -> Iterator[Path]:
    """A folder for this evaluation only, removed if the context ends without an error. All processes must enter it."""
    lock = _locked(key) if not world()[0] else None
    (path,) = gather([lock.lock_file] if lock else [])
    folder = Path(path).parent
    try:
        yield folder
    except BaseException:
        log.info("the same evaluation resumes from the feature maps in %s", folder)
        raise
    else:
        gather([])  # until every process has read what it needs
        if lock:
            with _births_and_deaths():
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        if lock:
            lock.release()


def _births_and_deaths() -> FileLock:
    """Held while a folder is made or removed: nobody takes one that is about to go."""
    return FileLock(cache_folder() / "features.lock")


def _locked(key: str) -> FileLock:
    for number in itertools.count():  # the same evaluation may run twice at once
        folder = cache_folder() / "features" / (f"{key}-{number}" if number else key)
        with in_words(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _births_and_deaths(), contextlib.suppress(Timeout):
                folder.mkdir(exist_ok=True)
                lock = FileLock(folder / "lock")
                lock.acquire(timeout=0)
                return lock
    raise AssertionError
