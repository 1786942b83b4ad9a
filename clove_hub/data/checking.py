"""Decodes every image of a data set once, in processes, and holds it against its annotations."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from .coco import CocoSplit
from .images import BrokenImage, decode, orientation, printable, read_bytes
from .masks import Segmented

Size = tuple[int, int]
"""Width and height in pixels, upright."""


class Images(Protocol):
    """Images, and what is known of each."""

    @property
    def paths(self) -> Sequence[Path]: ...

    def problem(self, index: int, size: Size) -> str:
        """What contradicts an image of this size; empty if nothing does."""


@dataclass(frozen=True)
class Unlabeled:
    paths: Sequence[Path]

    def problem(self, index: int, size: Size) -> str:
        return ""


@dataclass(frozen=True)
class Boxed:
    """Images with the sizes that their annotations were made for."""

    paths: Sequence[Path]
    sizes: Sequence[Size]

    @classmethod
    def of(cls, split: CocoSplit) -> Boxed:
        photos = split.photos
        return cls([photo.path for photo in photos], [(photo.width, photo.height) for photo in photos])

    def problem(self, index: int, size: Size) -> str:
        expected = self.sizes[index]
        if size == expected:
            return ""
        return f"{size[0]} x {size[1]} pixels, its annotations are for {expected[0]} x {expected[1]}"


@dataclass(frozen=True)
class Masked:
    """Images with a mask each."""

    part: Segmented

    @property
    def paths(self) -> Sequence[Path]:
        return [photo for photo, _ in self.part.pairs]

    def problem(self, index: int, size: Size) -> str:
        try:
            self.part.mask(self.part.pairs[index], size)
        except ValueError as error:
            return str(error)
        return ""


class Checked(NamedTuple):
    """What was found out about an image."""

    name: str
    size: Size | None
    """None where it cannot be read."""
    turned: int
    """Its EXIF orientation, 1 for none."""
    problem: str
    """Empty if there is none."""


def check(images: Images, numbers: Sequence[int], workers: int) -> Iterator[Checked]:
    """Checks the images with these numbers, in their order.

    Args:
        workers: processes that decode; 0 decodes in this one.

    Raises:
        ValueError: a process was killed, for want of memory or by a decoder's crash.
    """
    paths = list(images.paths)
    if workers == 0 or len(numbers) < 2:
        yield from (_check(images, paths, number) for number in numbers)
        return
    how = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, how, _begin, (images, paths)) as pool:
        try:
            yield from pool.map(_check_own, numbers, chunksize=min(64, -(-len(numbers) // workers)))
        except BrokenProcessPool as error:
            raise ValueError(
                "a process that decodes images was killed, for want of memory or by a crash of the decoder: fewer "
                "workers need less memory"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_own: tuple[Images, list[Path]]
"""In a process of the pool: what is checked. Sent along with each number it would be sent a million times."""


def _begin(images: Images, paths: list[Path]) -> None:
    global _own
    _own = images, paths


def _check_own(number: int) -> Checked:
    return _check(*_own, number)


def _check(images: Images, paths: list[Path], number: int) -> Checked:
    name = printable(paths[number])
    try:
        data = read_bytes(paths[number], name)
        height, width = decode(data, name).shape[:2]
    except BrokenImage as error:
        return Checked(name, None, 1, error.reason)
    turned = orientation(data)
    problem = images.problem(number, (width, height))
    if problem and turned >= 5 and not images.problem(number, (height, width)):
        problem += (
            f"; they fit it as it is stored, before its EXIF orientation {turned} turns it: remove that "
            f"(exiftool -Orientation= FILE), or annotate the upright image"
        )
    return Checked(name, (width, height), turned, problem)
