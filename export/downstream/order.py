"""Which images: the short lists of the low-data settings, and the order of training. Pure functions of a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from clove_hub.views import Purpose, stream

_Name = TypeVar("_Name", int, str)


def chosen(names: Sequence[_Name], fraction: float, seed: int) -> list[_Name]:
    """The images of a low-data setting, sorted: a list that depends on (names, fraction, seed) and nothing else.

    All names, sorted, are put into the order of as many uniform numbers of `stream(seed, 0, 1, Purpose.ORDER)`, and
    the first round(fraction * count) are taken, at least one. So the list of a smaller share lies within that of a
    larger one.
    """
    ordered = sorted(names)
    count = max(round(fraction * len(ordered)), 1)
    places = stream(seed, 0, 1, Purpose.ORDER).random(len(ordered)).argsort(kind="stable")[:count]
    return sorted(ordered[place] for place in places.tolist())


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The numbers 0 to count - 1 in the order of an epoch."""
    return stream(seed, epoch, 0, Purpose.ORDER).random(count).argsort(kind="stable")


@dataclass(frozen=True)
class StepSampler:
    """For each step from `start` on, this process's images as (epoch, index).

    The epochs' orders stand one behind the other, and step s takes the `batch` places from s * batch on, so that no
    image is left out at the end of an epoch; rank r takes the r-th part of them.
    """

    count: int
    batch: int
    seed: int
    start: int
    stop: int
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch // self.world
        for step in range(self.start, self.stop):
            first = step * self.batch + self.rank * share
            yield [self._image(place) for place in range(first, first + share)]

    def _image(self, place: int) -> tuple[int, int]:
        epoch, at = divmod(place, self.count)
        return epoch, int(epoch_order(self.count, self.seed, epoch)[at])
