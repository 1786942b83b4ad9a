"""The images and random numbers of each process in each step, for pre-training and fine-tuning.

Pure functions of a seed and the step: there is no state to save, and a run that resumes starts at its step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, Protocol, TypeVar

import numpy as np

Item = TypeVar("Item")


class Order(Protocol[Item]):
    """All images of a run, epoch after epoch, without end."""

    def batches(self, begins: Iterable[int], count: int) -> Iterator[list[Item]]:
        """The `count` images from each of some rising places on."""


@dataclass(frozen=True)
class StepSampler(Generic[Item]):
    """The micro-batches of one process from `start_step` up to, not including, `stop_step`.

    Step s takes the images s*G to (s+1)*G of the order, with G the global batch. Of these, micro-batch a of rank r takes
    the M images from (a*world + r)*M on: the union over ranks is the same for any number of processes.

    Raises:
        ValueError: the global batch does not divide.
    """

    order: Order[Item]
    global_batch: int  # images of an optimizer step, over all processes
    micro_batch: int  # images of one forward pass in one process
    rank: int
    world: int
    start_step: int
    stop_step: int
    skip: Sequence[tuple[int, int]] | None = None
    """As in `data_position`."""

    def __post_init__(self) -> None:
        if self.global_batch % (self.micro_batch * self.world):
            raise ValueError(
                f"batch.total={self.global_batch} does not divide into {self.world} processes x "
                f"{self.micro_batch} images; choose a multiple of {self.world * self.micro_batch}"
            )
        assert 0 <= self.rank < self.world
        assert 0 <= self.start_step <= self.stop_step

    def __iter__(self) -> Iterator[list[Item]]:
        begins = (
            data_position(step, self.skip) * self.global_batch + (part * self.world + self.rank) * self.micro_batch
            for step in range(self.start_step, self.stop_step)
            for part in range(self.global_batch // (self.micro_batch * self.world))
        )
        return self.order.batches(begins, self.micro_batch)


def data_position(step: int, skip: Sequence[tuple[int, int]] | None) -> int:
    """Which batch of the order step `step` takes, both counted from 0.

    Args:
        skip: first and last of batches that are left out, counted from 1.
    """
    for first, last in sorted(skip or ()):
        if step >= first - 1:
            step += last - first + 1
    return step


def taken(items: Iterable[Item], begins: Iterable[int], count: int) -> Iterator[list[Item]]:
    """The `count` items from each of some rising places on, fewer where they end; the others are passed over."""
    left, position = iter(items), 0
    for begin in begins:
        yield list(islice(left, begin - position, begin - position + count))
        position = begin + count


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of everything random in a step that is not about an image, such as stochastic depth or proposals.

    The random numbers of an image come from `clove_hub.views.stream`.

    Args:
        seed: the run's.
        step: counted from 0.
        rank: the process's rank, as each process draws different numbers.
    """
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def divide_batch(total: int, per_device: int, world: int) -> tuple[int, int]:
    """Images in one forward pass of a process, and how many passes make a step.

    Raises:
        ValueError: the global batch does not divide.
    """
    if total % world:
        near = [total // world * world, (total // world + 1) * world]
        raise ValueError(
            f"batch.total={total} does not divide among {world} processes: choose {near[1]}"
            + (f" or {near[0]}" if near[0] else "")
            + ", or another number of processes"
        )
    share = total // world
    micro = min(per_device, share)
    if share % micro:
        fitting = max(d for d in range(1, micro + 1) if share % d == 0)
        raise ValueError(
            f"batch.total={total} over {world} processes is {share} images for each, which batch.per_device={per_device} "
            f"does not divide: choose batch.per_device={fitting}"
        )
    return micro, share // micro


def divide_norms(norm_group: int | None, total: int, micro: int, world: int) -> int:
    """How many images share the statistics of batch norm.

    Args:
        norm_group: the recipe's; None for all of a step.
        total: images of a step.
        micro: of one forward pass of a process.

    Raises:
        ValueError: groups of this size cannot be formed; the message gives those that can.
    """
    group = norm_group or total
    if group > 1 and forms(group, micro, world):
        return group
    takes = possible_passes(group, total, world)
    sizes = [size for size in range(2, micro * world + 1) if forms(size, micro, world)]
    if not sizes:
        raise ValueError(
            f"batch.total={total} over {world} process{'es' * (world > 1)} with batch.per_device={micro} gives forward passes of "
            "one image, but batch norm needs at least two: raise batch.total or batch.per_device"
        )
    raise ValueError(
        f"batch.norm_group={norm_group or 'null'}: groups of {group} images cannot be formed from forward passes of "
        f"{world} process{'es' * (world > 1)} x {micro} images: choose "
        + (f"batch.per_device={listed(takes)}, or " if takes else "")
        + f"batch.norm_group={listed(sizes)}, which trains a different model"
        + (", or more processes" if group > micro * world else "")
    )


def possible_passes(group: int | None, total: int, world: int) -> list[int]:
    """How many images a forward pass of a process may have, the fewest first.

    Args:
        group: that share the statistics of batch norm; None where nothing normalizes.
        total: images of a step.

    Raises:
        ValueError: the global batch does not divide.
    """
    share, _ = divide_batch(total, total, world)
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    return sizes if group is None else [size for size in sizes if group > 1 and forms(group, size, world)]


def forms(group: int, micro: int, world: int) -> bool:
    """Whether a forward pass of `world` processes with `micro` images each is a number of whole groups."""
    return micro % group == 0 or (group % micro == 0 and world % (group // micro) == 0)


def listed(sizes: Sequence[int]) -> str:
    return " or ".join(map(str, reversed(sizes[-8:])))
