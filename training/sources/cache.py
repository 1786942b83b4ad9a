"""Decoded images, kept in memory that a training process shares with its workers."""

import logging
import math
import mmap
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.synchronize import Lock
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from clove_hub.data.bands import Reading
from clove_hub.data.images import BrokenImage

from ..run.host import available_memory, local_processes
from .source import Source

log = logging.getLogger(__name__)

_SAMPLED = 512  # images whose size is looked at before the run
_SLACK = 1.1  # room beyond the estimate, where not every size is known; untouched memory costs nothing
_USABLE = 0.9  # of what is available: the training process itself still grows

_ABSENT, _COMING, _HERE = 0, 1, 2


@dataclass(frozen=True)
class Cache:
    """The pixels of images by their index, each written once, by the worker that decodes it first.

    All of it lies in anonymous memory mapped before the workers are forked: one copy for all of them, no time
    spent before the first step, and nothing that would count against /dev/shm.
    """

    states: NDArray[np.uint8]  # (images,): _ABSENT, _COMING or _HERE
    offsets: NDArray[np.int64]  # (images,): where the pixels begin in `pixels`
    sides: NDArray[np.int32]  # (images, 4): height, width, bands and bytes of a value
    pixels: NDArray[np.uint8]  # (capacity,)
    used: NDArray[np.int64]  # (1,): bytes of `pixels` that are given away
    full: NDArray[np.bool_]  # (1,): whether an image did not fit any more
    # Also what orders the memory accesses of two processors: who sees _HERE sees the pixels.
    lock: Lock = field(default_factory=multiprocessing.Lock)

    def get(self, index: int) -> NDArray[Any] | None:
        """The pixels (H, W, C) of an image, in place, or None if they are not stored (yet)."""
        with self.lock:
            if self.states[index] != _HERE:
                return None
        *shape, size = self.sides[index].tolist()
        start = int(self.offsets[index])
        kind = np.uint8 if size == 1 else np.uint16
        image: NDArray[Any] = self.pixels[start : start + size * math.prod(shape)].view(kind).reshape(shape)
        return image

    def put(self, index: int, image: NDArray[Any]) -> None:
        """Store an image, uint8 or uint16 (H, W, C), unless it is already stored or the cache is full."""
        with self.lock:
            if self.states[index] != _ABSENT:
                return
            start = int(self.used[0])
            if start + image.nbytes > len(self.pixels):
                if not self.full[0]:
                    self.full[0] = True
                    log.warning(
                        "data.cache: its %.3g GB, estimated from %d images, are full; the other images are decoded each time",
                        len(self.pixels) / 1e9,
                        _SAMPLED,
                    )
                return
            self.used[0] = start + image.nbytes
            self.states[index] = _COMING
        self.offsets[index] = start
        self.sides[index] = *image.shape, image.itemsize
        self.pixels[start : start + image.nbytes] = image.reshape(-1).view(np.uint8)
        with self.lock:
            self.states[index] = _HERE


def open_cache(source: Source, reading: Reading) -> Cache:
    """An empty cache with room for all images of `source`, as `reading` decodes them.

    The room is estimated from 512 images spread over the source, of photos from their heads alone, or known where it has
    no more.

    Raises:
        ValueError: all images need more memory than there is.
    """
    images = len(source)
    sampled = np.linspace(0, images - 1, min(images, _SAMPLED)).astype(int).tolist()
    sizes = [size for size in (_size(source, index, reading) for index in sampled) if size]
    mean = float(np.mean(sizes)) if sizes else 0.0
    needed = mean * images
    processes = local_processes()  # each keeps its own, and in time all images
    available = available_memory()
    if needed * processes > _USABLE * available:
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise ValueError(
            f"data.cache=true needs about {needed / 1e9:.3g} GB{each} for {images} decoded images of {source.name!r}, but "
            f"{available / 1e9:.3g} GB of memory are available, of which {_USABLE:.0%} may be used. Leave data.cache off, "
            "or keep smaller images with data.draft"
        )
    room = sum(sizes) if images <= _SAMPLED else int(_SLACK * needed)
    log.info("decoded images are kept in memory: up to %.3g GB for each process", needed / 1e9)
    return Cache(
        states=_shared((images,), np.uint8),
        offsets=_shared((images,), np.int64),
        sides=_shared((images, 4), np.int32),
        pixels=_shared((max(room, 1),), np.uint8),
        used=_shared((1,), np.int64),
        full=_shared((1,), np.bool_),
    )


def _size(source: Source, index: int, reading: Reading) -> int | None:
    try:
        return reading.nbytes(source.read(index).data)
    except BrokenImage:
        return None  # it will be replaced by another and never kept


def _shared(shape: Sequence[int], kind: DTypeLike) -> NDArray[Any]:
    """Zeros in memory that stays the same memory in forked processes."""
    kind = np.dtype(kind)
    return np.frombuffer(mmap.mmap(-1, kind.itemsize * int(np.prod(shape))), kind).reshape(shape)
