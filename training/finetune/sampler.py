"""Which images each step of fine-tuning sees. Pure functions of a seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clove_hub.views import Purpose, stream


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The numbers 0 to count - 1 in the order of an epoch."""
    return stream(seed, epoch, 0, Purpose.ORDER).random(count).argsort(kind="stable")


def batches(kinds: Sequence[int], batch: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    """The images of one step after the other as (epoch, index), without end; those of a step are of one kind.

    The epochs' orders stand one behind the other, and a kind's images wait until they are `batch`, those that an
    epoch leaves over for the next. So no image is left out, and where all are of one kind the order is the epochs'.

    Args:
        kinds: of each image.
    """
    waiting: dict[int, list[tuple[int, int]]] = {kind: [] for kind in kinds}
    for epoch in itertools.count():
        for index in epoch_order(len(kinds), seed, epoch).tolist():
            together = waiting[kinds[index]]
            together.append((epoch, index))
            if len(together) == batch:
                yield together.copy()
                together.clear()


@dataclass(frozen=True)
class StepSampler:
    """For each step from `start` on, this process's images: of the step's `batches`, rank r takes the r-th part."""

    kinds: Sequence[int]
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
        for images in itertools.islice(batches(self.kinds, self.batch, self.seed), self.start, self.stop):
            yield images[self.rank * share : (self.rank + 1) * share]
