"""Tar files in WebDataset layout, through an index made at start and read block by block.

Reading single images at random is slow where seeking is: on hard disks and network file systems. So an epoch goes
through blocks of 8 MiB, shuffled, of which about a hundred are in use at a time. The first image that a process reads
of a block has the system fetch the block as a whole, in one sequential read; the others come from the page cache. The
order is a pure function of (seed, epoch), so any worker of any process can start at any step.
"""

import os
import re
import tarfile
from collections import deque
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clove_hub.data.images import BrokenImage, printable, readable_suffixes

from .source import Encoded, Names, fingerprint, shuffled_in_blocks

_BLOCK = 2**23  # bytes read in one go
_WINDOW = 8192  # images over which a block is used up; 0.9 GB of page cache with ImageNet's
_FETCHED = 256  # blocks that a process remembers to have asked for: more than are in use at a time

ANY_IMAGE = "image"  # the column that means: whichever member of a sample is an image


@dataclass(frozen=True)
class Shards:
    """The images inside tar files, in the order of the files and of their members."""

    name: str
    paths: tuple[str, ...]
    names: Names
    shards: NDArray[np.int32]  # (images,) which path
    offsets: NDArray[np.int64]  # (images,) where the bytes begin
    sizes: NDArray[np.int64]  # (images,) how many

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(len(self), (*self.names.arrays, self.sizes), self.read)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def blocks(self) -> NDArray[np.int64]:
        """(blocks,): the first image of each block. An image belongs to the block in which its bytes begin."""
        numbers = self.offsets // _BLOCK
        changes = (np.diff(self.shards) != 0) | (np.diff(numbers) != 0)
        return np.concatenate([[0], 1 + np.flatnonzero(changes)])

    @cached_property
    def _fetched(self) -> deque[int]:
        """The blocks that this process has asked for of late."""
        return deque(maxlen=_FETCHED)

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        return shuffled_in_blocks(seed, epoch, self.blocks, len(self), _WINDOW)

    def read(self, index: int) -> Encoded:
        """Open the file for each read: this takes a few microseconds, and processes share no state."""
        path = self.paths[self.shards[index]]
        name = f"{Path(path).name}/{printable(self.names[index])}"
        try:
            with open(path, "rb") as file:
                if hasattr(os, "posix_fadvise"):  # not on macOS
                    self._fetch_block(index, file.fileno())
                file.seek(int(self.offsets[index]))
                return Encoded(name, file.read(int(self.sizes[index])))
        except OSError as error:
            raise BrokenImage(name, f"cannot be read: {error.strerror or error}") from error

    def _fetch_block(self, index: int, descriptor: int) -> None:
        """Has the system fetch the block of an image, unless this process has asked for it already."""
        block = int(np.searchsorted(self.blocks, index, side="right")) - 1
        if block not in self._fetched:
            self._fetched.append(block)
            end = self.blocks[block + 1] if block + 1 < len(self.blocks) else len(self)
            first, last = int(self.offsets[self.blocks[block]]), int(self.offsets[end - 1] + self.sizes[end - 1])
            os.posix_fadvise(descriptor, first, last - first, os.POSIX_FADV_WILLNEED)


class _Member(NamedTuple):
    name: bytes
    offset: int
    size: int


def open_shards(pattern: str, column: str = ANY_IMAGE, suffixes: Collection[str] | None = None) -> Shards:
    """Indexes tar files by reading their headers.

    `pattern` is a tar file, a folder of them (at any depth), or a path with `{000..099}`, `{a,b}`, `*` or `?`
    in it. A sample is made of the members that share a name up to the first dot; `column` is the ending (such
    as `jpg`) of the member to take, and `image` takes the one that is an image: has one of `suffixes`, by default those
    of photos.

    Raises:
        ValueError: a file is missing, compressed or damaged, nothing matches, there is no image, or a sample
            has several and `column` does not say which.
    """
    paths = _find(pattern)
    suffixes = readable_suffixes() if suffixes is None else suffixes
    with ThreadPoolExecutor() as pool:  # headers lie far apart: on a network disk nearly all of the time is waiting
        scans = list(pool.map(_scan, paths))
    kept = [[member for member in scan if _is_wanted(member.name, column, suffixes)] for scan in scans]
    members = [member for of_shard in kept for member in of_shard]
    if not members:
        wanted = "no image" if column == ANY_IMAGE else f"no member ending in .{column}"
        endings = sorted({_split(member.name)[1] for scan in scans for member in scan})
        found = f"their members end in {', '.join(endings[:8])}" if endings else "they have no members"
        raise ValueError(f"data.path={pattern!r}: {wanted} in {len(paths)} tar files; {found}")
    for path, of_shard in zip(paths, kept, strict=True):
        seen: dict[str, str] = {}
        for member in of_shard:
            sample, ending = _split(member.name)
            if sample in seen:
                raise ValueError(
                    f"the shard {path!r} has several images for the sample {sample!r} ({seen[sample]}, "
                    f"{ending}): say which to use with data.column, for example data.column={seen[sample]}"
                )
            seen[sample] = ending
    return Shards(
        name=Path(pattern).expanduser().name,
        paths=tuple(paths),
        names=Names(member.name for member in members),
        shards=np.repeat(np.arange(len(paths), dtype=np.int32), [len(of_shard) for of_shard in kept]),
        offsets=np.array([member.offset for member in members], dtype=np.int64),
        sizes=np.array([member.size for member in members], dtype=np.int64),
    )


def expand(pattern: str) -> list[str]:
    """Writes out the braces of a pattern: `a{08..10}` is a08, a09, a10 and `a{x,y}` is ax, ay.

    Raises:
        ValueError: a range runs backwards.
    """
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
    if span is None:
        choices = brace[1].split(",")
    else:
        first, last = int(span[1]), int(span[2])
        if first > last:
            raise ValueError(f"data.path={pattern!r}: the range {brace[0]} must begin with its smaller number")
        choices = [str(number).zfill(len(span[1])) for number in range(first, last + 1)]
    before, after = pattern[: brace.start()], pattern[brace.end() :]
    return [path for choice in choices for path in expand(before + choice + after)]


def _find(pattern: str) -> list[str]:
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ValueError(
            f"data.path={pattern!r}: shards are read from a disk. Copy them there, or read them with "
            "data.source=huggingface data.streaming=true"
        )
    root = Path(pattern).expanduser()
    if root.is_dir():
        found = sorted(str(path) for path in root.rglob("*.tar"))
        if not found:
            raise ValueError(f"data.path={pattern!r} is a folder without a .tar file, at any depth")
        return found
    paths: list[str] = []
    for path in expand(str(root)):
        paths += sorted(glob(path)) if has_magic(path) else [path]
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise ValueError(
            f"data.path={pattern!r}: {len(missing)} of {len(paths)} tar files do not exist, first {missing[0]!r}"
        )
    if not paths:
        raise ValueError(f"data.path={pattern!r} matches no file")
    return paths


def _scan(path: str) -> list[_Member]:
    """The regular files inside a tar file."""
    try:
        with tarfile.open(path, "r:") as tar:
            return [
                _Member(member.name.encode("utf-8", "surrogateescape"), member.offset_data, member.size)
                for member in tar
                if member.isreg()
            ]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(
            f"the shard {path!r} cannot be read as a plain tar file: {error}. If it is compressed, unpack "
            "it once (images gain nothing, and a compressed file cannot be read at random); if damaged, "
            "copy it again or leave it out of data.path"
        ) from error


def _split(name: bytes) -> tuple[str, str]:
    """Sample and ending of a member, as WebDataset has them: `a/b.c/1.seg.png` is (`a/b.c/1`, `seg.png`)."""
    path = PurePosixPath(printable(name))
    stem, _, ending = path.name.partition(".")
    return str(path.with_name(stem)) if stem else str(path), ending.lower()


def _is_wanted(name: bytes, column: str, suffixes: Collection[str]) -> bool:
    if PurePosixPath(printable(name)).name.startswith("."):
        return False
    ending = _split(name)[1]
    if column == ANY_IMAGE:
        return "." + ending.rpartition(".")[2] in suffixes
    return ending == column.lower()
