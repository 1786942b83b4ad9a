"""Work divided among the processes of `torch.distributed`, with the result of a single process.

Work is cut into units whose content does not depend on the number of processes (a batch, a clip, a class); each unit
is done by exactly one process, and all get all results, in the order of the units. No sampler pads the last batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import distributed as dist

T = TypeVar("T")


def world() -> tuple[int, int]:
    """Number of this process, and of all."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share(units: Sequence[T]) -> list[T]:
    """Those of the units that this process does: every world-th, from its own number on."""
    rank, size = world()
    return list(units[rank::size])


def gather(done: Iterable[T]) -> list[T]:
    """The results of all units in their order, from those of each process's `share`. All processes must call it.

    A ValueError of one process is raised by all, so that none waits forever.
    """
    rank, size = world()
    own: list[T] | ValueError
    try:
        own = list(done)
    except ValueError as error:
        own = error
    if size == 1:
        if isinstance(own, ValueError):
            raise own
        return own
    parts: list[list[T] | ValueError | None] = [None] * size
    dist.all_gather_object(parts, own)
    for number, part in enumerate(parts):
        if isinstance(part, ValueError):
            raise own if isinstance(own, ValueError) and number == rank else part
    lists = [part for part in parts if isinstance(part, list)]
    return [lists[number % size][number // size] for number in range(sum(map(len, lists)))]


@contextmanager
def process_group(device: str | None) -> Iterator[str]:
    """The device of this process, which joins the group if `torchrun` or `accelerate launch` started several."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device {device}: {error}") from error
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield str(place)
        return
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield str(place)
    finally:
        dist.destroy_process_group()
