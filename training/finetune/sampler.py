"""The order of the images in fine-tuning."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..run.sampler import taken
from ..sources.source import shuffled


@dataclass(frozen=True)
class OrderByKind:
    """Images as (epoch, index), each epoch's after the other's; those of one step are of one kind.

    A kind's images wait until they fill a batch, those that an epoch leaves over for the next. So no image is left out,
    and where all are of one kind the order is the epochs'.
    """

    kinds: Sequence[int]  # of each image
    batch: int  # images of a step, over all processes
    seed: int

    def batches(self, begins: Iterable[int], count: int) -> Iterator[list[tuple[int, int]]]:
        return taken(itertools.chain.from_iterable(self._steps()), begins, count)

    def _steps(self) -> Iterator[list[tuple[int, int]]]:
        waiting: dict[int, list[tuple[int, int]]] = {kind: [] for kind in self.kinds}
        for epoch in itertools.count():
            for index in shuffled(self.seed, epoch, len(self.kinds)).tolist():
                together = waiting[self.kinds[index]]
                together.append((epoch, index))
                if len(together) == self.batch:
                    yield together.copy()
                    together.clear()
