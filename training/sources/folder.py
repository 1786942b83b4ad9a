"""Folders of image files, however deep."""

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from .source import Encoded, Names, fingerprint, printable, read_file, shuffled

IMAGE_SUFFIXES = frozenset(
    f".{ending}"
    for ending in (
        *("avif", "bmp", "gif", "jfif", "jp2", "jpe", "jpeg", "jpg"),
        *("pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp"),
    )
)


@dataclass(frozen=True)
class Folder:
    """The images beneath a folder, in the order of their relative paths; or of several, one folder after the other."""

    roots: tuple[str, ...]
    starts: tuple[int, ...]
    """The number of the first image of each folder."""
    names: Names
    """Relative to the folder that an image lies beneath."""

    @property
    def name(self) -> str:
        return "+".join(Path(root).resolve().name for root in self.roots)

    @cached_property
    def fingerprint(self) -> str:
        borders = [np.array(self.starts)] if len(self.roots) > 1 else []
        return fingerprint(len(self), [*self.names.arrays, *borders], self.read)

    def __len__(self) -> int:
        return len(self.names)

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        return shuffled(seed, epoch, len(self))

    def read(self, index: int) -> Encoded:
        relative = self.names[index]
        path = os.path.join(os.fsencode(self.roots[bisect_right(self.starts, index) - 1]), relative)
        return read_file(path, printable(relative if len(self.roots) == 1 else path))


def open_folders(paths: Sequence[str]) -> Folder:
    """Lists the images of folders and of the folders inside them.

    Links to folders are followed, each folder once. Hidden files and folders (`.name`) are left out: they are
    thumbnails and leftovers of tools.

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
    found_by: dict[str, str] = {}
    for path, root in zip(paths, roots, strict=True):
        images, others, walked = _walk(root)
        twice = sorted(folder for folder in walked if folder in found_by)
        if twice:
            raise ValueError(
                f"data.path: {found_by[twice[0]]!r} and {path!r} both lead to {twice[0]!r}, whose images would count "
                "twice; leave one of the two out"
            )
        if not images:
            raise ValueError(f"data.path={path!r} holds no image. {_what_is_there(others)}")
        found_by |= dict.fromkeys(walked, path)
        starts.append(len(names))
        names += sorted(images)
    return Folder(tuple(map(str, roots)), tuple(starts), Names(names))


def _walk(root: Path) -> tuple[list[bytes], Counter[str], set[str]]:
    """Relative paths of the images, how many other files there are with each ending, and all folders, links resolved."""
    images: list[bytes] = []
    others: Counter[str] = Counter()
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_refuse):
        real = os.path.realpath(folder)
        if real in seen:  # a link back to a folder above would be followed for ever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in files:
            if file.startswith("."):
                continue
            suffix = PurePath(file).suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                images.append(os.fsencode(os.path.relpath(os.path.join(folder, file), root)))
            else:
                others[suffix] += 1
    return images, others, seen


def _refuse(error: OSError) -> None:
    raise ValueError(
        f"the folder {error.filename!r} inside data.path cannot be listed: {error.strerror}. "
        "Make it readable or move it away; leaving it out in silence would change the data."
    ) from error


def _what_is_there(others: Counter[str]) -> str:
    looked_for = f"Looked for files ending in {', '.join(sorted(IMAGE_SUFFIXES))}, at any depth"
    if not others:
        return f"{looked_for}; there is no file at all."
    found = ", ".join(f"{count} x {suffix or '(no ending)'}" for suffix, count in others.most_common(5))
    hint = ""
    if ".tar" in others:
        hint = " For tar shards set data.source=shards."
    elif others.keys() & {".parquet", ".arrow"}:
        hint = " For a data set in Parquet or Arrow files set data.source=huggingface."
    return f"{looked_for}; found {found}.{hint}"
