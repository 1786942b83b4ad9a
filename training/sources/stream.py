"""Images that come one after the other, shuffled as far as that goes without holding all of them."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from clove_hub.views import Purpose, stream

from .source import Encoded, Pending, fingerprint, pending

_T = TypeVar("_T")

_BUFFER = 1000  # images among which the next one is drawn, held in memory as they are stored
_OPEN_FILES = 8  # read in turn, because the images of one file are often of one kind


@dataclass(frozen=True)
class Stream:
    """A data set that is read from front to back: an image cannot be asked for by its number.

    `rows` is a `datasets.IterableDataset` with one column, not decoded; `length` is the number of images in
    an epoch; `spare` is the first image that can be decoded, which takes the place of those that cannot.
    """

    name: str
    rows: Any
    column: str
    length: int
    spare: Encoded

    @cached_property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that change with the number of images and the first good one."""
        return fingerprint(self.length, (), lambda _: self.spare)

    def __len__(self) -> int:
        return self.length

    def walk(self, seed: int, epoch: int) -> Iterator[Pending]:
        """Goes once through the images, in an order that depends on (seed, epoch) alone.

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
