"""From an image source to batches of crops: which images a step sees, and what replaces a broken one.

Everything here is a function of the seed, the global step and the index of an image. There is no state to
save: a run that resumes starts the sampler at its step, and neither the number of workers nor that of
processes changes what a step sees.
"""

import dataclasses
import logging
import math
import re
import sys
from collections.abc import Iterator
from ctypes import c_bool
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Generator
from torch.utils.data import DataLoader, get_worker_info

from clove_hub.data.images import decode
from clove_hub.views import CropBatch, Purpose, ViewSpec, allocate, draw, stream, write_sample

from .run.stopping import deaf_workers
from .sources import BrokenImage, Cache, Pending, Source, Stream, fast_jpeg, open_cache

log = logging.getLogger(__name__)

_SUBSTITUTES = 16  # other images tried in place of a broken one
_PREFETCH = 2  # batches that each worker keeps ready
_LACK_OF_SHARED_MEMORY = r"shared memory|bus error|no space left on device|unable to (mmap|resize file)"


# ---- which images, when ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """One sample on its way to a worker. `image` is given for streams, where a worker cannot ask by index."""

    epoch: int
    index: int
    image: Pending | None = None


def steps_per_epoch(source: Source | Stream, global_batch: int) -> int:
    """Whole global batches in an epoch; the images that are left over wait for another epoch's order.

    Raises:
        ValueError: the source has fewer images than one global batch.
    """
    steps = len(source) // global_batch
    if steps == 0:
        raise ValueError(
            f"data.path: {source.name!r} has {len(source)} images, fewer than one global batch "
            f"(batch.total={global_batch}), so an epoch would have no step. Add images or lower batch.total"
        )
    return steps


@dataclass(frozen=True)
class StepSampler:
    """The micro-batches of one process from `start_step` up to, not including, `stop_step`.

    Step s takes the images k*G to (k+1)*G of its epoch's order, with G the global batch and k the number of
    the step in its epoch. Of these, micro-batch a of rank r takes the M images from (a*world + r)*M on: the
    union over ranks is the same for any number of processes.

    Raises:
        ValueError: the global batch does not divide, is larger than the source, or (while iterating) a stream
            has fewer images than it was said to have.
    """

    source: Source | Stream
    seed: int
    global_batch: int  # images of an optimizer step, over all processes
    micro_batch: int  # images of one forward pass in one process
    rank: int
    world: int
    start_step: int
    stop_step: int

    def __post_init__(self) -> None:
        if self.global_batch % (self.micro_batch * self.world):
            raise ValueError(
                f"batch.total={self.global_batch} does not divide into {self.world} processes x "
                f"{self.micro_batch} images; choose a multiple of {self.world * self.micro_batch}"
            )
        steps_per_epoch(self.source, self.global_batch)
        assert 0 <= self.rank < self.world
        assert 0 <= self.start_step <= self.stop_step

    def __len__(self) -> int:
        return (self.stop_step - self.start_step) * self._accumulation

    def __iter__(self) -> Iterator[list[Item]]:
        steps = steps_per_epoch(self.source, self.global_batch)
        for epoch in range(self.start_step // steps, math.ceil(self.stop_step / steps)):
            first = max(self.start_step - epoch * steps, 0)
            last = min(self.stop_step - epoch * steps, steps)
            begins = [
                step * self.global_batch + (part * self.world + self.rank) * self.micro_batch
                for step in range(first, last)
                for part in range(self._accumulation)
            ]
            if isinstance(self.source, Stream):
                yield from self._walked(self.source, epoch, begins)
            else:
                order = self.source.order(self.seed, epoch)
                for begin in begins:
                    yield [Item(epoch, index) for index in order[begin : begin + self.micro_batch].tolist()]

    @property
    def _accumulation(self) -> int:
        return self.global_batch // (self.micro_batch * self.world)

    def _walked(self, source: Stream, epoch: int, begins: list[int]) -> Iterator[list[Item]]:
        # Every process walks the whole stream and keeps its own: only so is their number without effect.
        images = enumerate(source.walk(self.seed, epoch))
        position = 0
        for begin in begins:
            batch = [
                Item(epoch, index, image)
                for index, image in islice(images, begin - position, begin - position + self.micro_batch)
            ]
            if len(batch) < self.micro_batch:
                raise ValueError(
                    f"the stream {source.name!r} ended before image {begin + self.micro_batch}, but was said "
                    f"to have {len(source)}; set data.length to the number that it has"
                )
            position = begin + self.micro_batch
            yield batch


# ---- from items to crops ---------------------------------------------------------------------------------


class Broken(NamedTuple):
    """An image that was replaced by another, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class LoadedBatch:
    """The crops of one micro-batch, the indices of its samples, and the images that had to be replaced."""

    crops: CropBatch
    indices: list[int]
    broken: list[Broken]

    def pin_memory(self) -> "LoadedBatch":
        """The same batch in page-locked memory; a DataLoader with `pin_memory=True` calls this."""
        return dataclasses.replace(self, crops=self.crops.pin_memory())


@dataclass(frozen=True)
class ViewDataset:
    """Makes the crops of a whole micro-batch at once.

    A broken image is replaced by another, drawn from (seed, epoch, index) like everything else; the crops are
    drawn for the sample whose place it takes. `draft` is that of `decode`; images in `cache` are not decoded again.
    """

    source: Source | Stream
    spec: ViewSpec
    seed: int
    draft: int | None = None
    cache: Cache | None = None

    def __getitems__(self, items: list[Item]) -> LoadedBatch:
        """Reads, decodes and crops.

        Raises:
            ValueError: an image and all that could replace it are broken.
        """
        # A DataLoader would move the crops to shared memory later, in a thread whose errors reach nobody: the run would
        # wait for ever.
        crops = allocate(self.spec, len(items), shared=get_worker_info() is not None)
        broken: list[Broken] = []
        for position, item in enumerate(items):
            image = self._image(item, broken)
            height, width, _ = image.shape
            views = draw(self.spec, self.seed, item.epoch, item.index, height, width)
            write_sample(crops, position, image, views)
        return LoadedBatch(crops, [item.index for item in items], broken)

    def _image(self, item: Item, broken: list[Broken]) -> NDArray[np.uint8]:
        """(H, W, 3); names in `broken` what had to be passed over."""
        found: list[Broken] = []
        for attempt in range(1 + _SUBSTITUTES):
            try:
                image = self._pixels(item, attempt)
            except BrokenImage as error:
                found.append(Broken(error.name, error.reason))
            else:
                broken += found
                return image
        raise ValueError(
            f"data.path: {len(found)} images of {self.source.name!r} in a row cannot be used. "
            f"{'; '.join(f'{name}: {reason}' for name, reason in found[:3])}; ..."
        )

    def _pixels(self, item: Item, attempt: int) -> NDArray[np.uint8]:
        """(H, W, 3) of the item's own image at first, then of what may stand in for it."""
        if isinstance(self.source, Stream):
            assert item.image is not None
            encoded = item.image.read() if attempt == 0 else self.source.spare
            return decode(encoded.data, encoded.name, self.draft)
        index = item.index
        if attempt:
            draws = stream(self.seed, item.epoch, item.index, Purpose.SUBSTITUTE).bit_generator
            index = int(draws.random_raw(attempt)[-1] % np.uint64(len(self.source)))
        kept = self.cache.get(index) if self.cache else None
        if kept is not None:
            return kept
        encoded = self.source.read(index)
        image = decode(encoded.data, encoded.name, self.draft)
        if self.cache:
            self.cache.put(index, image)
        return image


# ---- the loader ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loader:
    """The batches of a DataLoader; a lack of shared memory becomes an error that says what to do."""

    batches: "DataLoader[LoadedBatch]"
    shared_bytes: int  # in the batches that wait for the training process
    leaving: c_bool  # shared with the workers: from now on SIGTERM is meant for them

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[LoadedBatch]:
        self.leaving.value = False
        try:
            yield from self.batches
        except (RuntimeError, OSError) as error:
            if not (self.batches.num_workers and _is_lack_of_shared_memory(error)):
                raise
            gigabytes = self.shared_bytes / 1e9
            raise RuntimeError(
                f"a data-loading worker ran out of shared memory (/dev/shm): {_PREFETCH} batches of each of "
                f"{self.batches.num_workers} workers need about {gigabytes:.2g} GB. Start the container with "
                f"--shm-size={math.ceil(1.5 * gigabytes)}g (Docker gives 64 MB) or --ipc=host, "
                "enlarge /dev/shm, or lower data.workers"
            ) from error
        finally:
            self.leaving.value = True


def make_loader(
    source: Source | Stream,
    spec: ViewSpec,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    start_step: int,
    stop_step: int,
    workers: int,
    pin_memory: bool,
    draft: int | None = None,
    cache: bool = False,
) -> Loader:
    """The micro-batches of one process for the steps from `start_step` to `stop_step`, in order.

    Iterate over it once, for the whole run. Workers use one thread each (torch sees to it) and leave the
    signals that end a run to the training process. The global random state is not touched.

    `draft` and `cache` are those of the recipe's `data` section (see `DataSettings`).

    Raises:
        ValueError: the global batch does not divide, or is larger than the source; `draft` is smaller than a view;
            the decoded images do not fit in memory, or the workers cannot share them.
    """
    largest = max(view.size for view in spec.views)
    if draft is not None and draft < largest:
        raise ValueError(
            f"data.draft={draft} is smaller than the largest view ({largest} pixels): even the whole image would be "
            f"enlarged. Use at least {largest}, better 512"
        )
    if cache and workers and sys.platform != "linux":
        raise ValueError(
            "data.cache=true needs workers that share the memory of the training process, as on Linux: "
            "set data.workers=0 or leave data.cache off"
        )
    log.info("JPEGs are decoded by %s", fast_jpeg()[1])  # tried here, once, before the workers are forked
    kept = open_cache(source, draft) if cache and not isinstance(source, Stream) else None
    sampler = StepSampler(source, seed, global_batch, micro_batch, rank, world, start_step, stop_step)
    leaving, prepare_worker = deaf_workers()
    batches = DataLoader[LoadedBatch](
        ViewDataset(source, spec, seed, draft, kept),  # type: ignore[arg-type]  # read through __getitems__ alone
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=prepare_worker,
        prefetch_factor=_PREFETCH if workers else None,
        # A worker notices that its parent is gone; started by a fork server (Python's choice from 3.14 on), its parent
        # is that server, and it would outlive a killed run.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        generator=Generator().manual_seed(0),  # the global one belongs to the model
    )
    pixels = sum(3 * view.size**2 for view in spec.views)
    return Loader(batches, pixels * micro_batch * workers * _PREFETCH, leaving)


def _as_it_is(batch: Any) -> Any:
    """Collates nothing: the dataset makes whole batches."""
    return batch


def _is_lack_of_shared_memory(error: BaseException | None) -> bool:
    """Looks through the causes: torch reports a worker's death apart from the signal that it died of."""
    while error is not None:
        message = str(error)
        if "Too many open files" in message:  # here torch says "shared memory" too, but the cure is ulimit -n
            return False
        if re.search(_LACK_OF_SHARED_MEMORY, message, re.IGNORECASE):
            return True
        error = error.__cause__
    return False
