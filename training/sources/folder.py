"""Folders of image files, however deep."""

import logging
import os
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clove_hub.data.finder import find_images, what_is_there
from clove_hub.data.images import BrokenImage, printable, read_bytes

from .source import Encoded, Names, fingerprint, shuffled

log = logging.getLogger(__name__)

_SLIDE = 2**30  # bytes
_END = 2**20


@dataclass(frozen=True)
class Folder:
    """The images beneath a folder, in the order of their relative paths; or of several, one folder after the other."""

    roots: tuple[str, ...]
    starts: tuple[int, ...]
    """The number of the first image of each folder."""
    names: Names
    """Relative to the folder that an image lies beneath."""
    sizes: NDArray[np.int64]  # (images,) bytes of the files

    @property
    def name(self) -> str:
        return "+".join(Path(root).resolve().name for root in self.roots)

    @cached_property
    def fingerprint(self) -> str:
        borders = [np.array(self.starts)] if len(self.roots) > 1 else []
        return fingerprint(len(self), [*self.names.arrays, self.sizes, *borders], self._sample)

    def __len__(self) -> int:
        return len(self.names)

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        return shuffled(seed, epoch, len(self))

    def _sample(self, index: int) -> Encoded:
        """What a fingerprint takes of an image: all of it, and of a slide of a gigabyte or more both ends."""
        if self.sizes[index] < _SLIDE:
            return self.read(index)
        name = printable(self.names[index])
        try:
            with open(self.path(index), "rb") as file:
                head = file.read(_END)
                file.seek(-_END, os.SEEK_END)
                return Encoded(name, head + file.read())
        except OSError as error:
            raise BrokenImage(name, f"cannot be read: {error.strerror or error}") from error

    def path(self, index: int) -> bytes:
        return os.path.join(os.fsencode(self.roots[bisect_right(self.starts, index) - 1]), self.names[index])

    def read(self, index: int) -> Encoded:
        relative = self.names[index]
        path = self.path(index)
        name = printable(relative if len(self.roots) == 1 else path)
        return Encoded(name, read_bytes(path, name))


def open_folders(paths: Sequence[str], suffixes: Collection[str] | None = None) -> Folder:
    """Lists the images of folders and of the folders inside them, as `find_images` finds them.

    Args:
        suffixes: as in `find_images`.

    Raises:
        ValueError: one of them does not exist, is not a folder, cannot be listed, or holds no image; or a folder is
            found beneath two of them.
    """
    roots = [Path(path).expanduser() for path in paths]
    for path, root in zip(paths, roots, strict=True):
        if not root.is_dir():
            problem = "is a file" if root.exists() else "does not exist"
            hint = "; for tar shards set data.source=shards" if root.suffix == ".tar" else ""
            raise ValueError(f"data.path={path!r} {problem}; data.source=folder needs a folder of images{hint}")
    names: list[bytes] = []
    starts: list[int] = []
    sizes: list[int] = []
    found_by: dict[str, str] = {}
    for path, root in zip(paths, roots, strict=True):
        found = find_images(root, with_sizes=True, suffixes=suffixes)
        twice = sorted(folder for folder in found.folders if folder in found_by)
        if twice:
            raise ValueError(
                f"data.path: {found_by[twice[0]]!r} and {path!r} both lead to {twice[0]!r}, whose images would count "
                "twice; leave one of the two out"
            )
        if not found.names:
            way_out = ""
            if ".tar" in found.tally.left_out:
                way_out = " For tar shards set data.source=shards."
            elif found.tally.left_out.keys() & {".parquet", ".arrow"}:
                way_out = " For a data set in Parquet or Arrow files set data.source=huggingface."
            raise ValueError(f"data.path={path!r} holds no image. {what_is_there(found.tally)}{way_out}")
        log.info("%s: %s", path, found.tally)
        found_by |= dict.fromkeys(found.folders, path)
        starts.append(len(names))
        names += found.names
        sizes += found.sizes
    return Folder(tuple(map(str, roots)), tuple(starts), Names(names), np.array(sizes, dtype=np.int64))
