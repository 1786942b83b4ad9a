"""From an image source to batches of crops: which images a step sees, and what replaces a broken one.

Everything here is a function of the seed, the global step and the index of an image. There is no state to
save: a run that resumes starts the sampler at its step, and neither the number of workers nor that of
processes changes what a step sees.
"""

import dataclasses
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from clove_hub.data.bands import PHOTOS, Reading
from clove_hub.data.images import pixel_bytes
from clove_hub.data.tiff import LargeImage, open_large
from clove_hub.views import CropBatch, Draw, Purpose, ViewSpec, allocate, draw, stream, write_sample

from .run.loader import open_loader
from .run.sampler import StepSampler, taken
from .sources import BrokenImage, Cache, Folder, Pending, Source, Stream, fast_jpeg, open_cache

log = logging.getLogger(__name__)

_LOOKED_AT = 8  # images whose size shows whether data.draft would help
_SUBSTITUTES = 16  # other images tried in place of a broken one


# ---- which images, when ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """One sample on its way to a worker. `image` is given for streams, where a worker cannot ask by index."""

    epoch: int
    index: int
    image: Pending | None = None


def steps_per_epoch(source: Source | Stream, global_batch: int) -> int:
    """Complete global batches in an epoch; leftover images have to wait for the order of a later epoch.

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
class EpochOrder:
    """Each epoch's order of a source, up to the last whole global batch, one after the other.

    Raises:
        ValueError: the source has fewer images than one global batch, or (while iterating) a stream has fewer images
            than declared.
    """

    source: Source | Stream
    seed: int
    global_batch: int

    def __post_init__(self) -> None:
        steps_per_epoch(self.source, self.global_batch)

    def batches(self, begins: Iterable[int], count: int) -> Iterator[list[Item]]:
        length = steps_per_epoch(self.source, self.global_batch) * self.global_batch
        for epoch, group in groupby(begins, lambda begin: begin // length):
            within = (begin - epoch * length for begin in group)
            if isinstance(self.source, Stream):
                yield from self._walked(self.source, epoch, within, count)
            else:
                order = self.source.order(self.seed, epoch)
                for begin in within:
                    yield [Item(epoch, index) for index in order[begin : begin + count].tolist()]

    def _walked(self, source: Stream, epoch: int, begins: Iterable[int], count: int) -> Iterator[list[Item]]:
        walked = 0

        def items() -> Iterator[Item]:
            nonlocal walked
            for walked, image in enumerate(source.walk(self.seed, epoch), start=1):
                yield Item(epoch, walked - 1, image)

        # Every process walks the whole stream and keeps its own, so that the number of processes has no effect.
        for batch in taken(items(), begins, count):
            if len(batch) < count:
                raise ValueError(
                    f"the stream {source.name!r} ended after {walked} images instead of {len(source)}: set "
                    f"data.length={walked} and another run.output"
                )
            yield batch


# ---- from items to crops ---------------------------------------------------------------------------------


Pixels = NDArray[Any] | list[NDArray[Any]]
"""An image (H, W, C), or what each of its crops cuts out of it."""


class Broken(NamedTuple):
    """An image that was replaced by another, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class LoadedBatch:
    """The crops of one micro-batch, the indices of its samples, and the replaced images."""

    crops: CropBatch
    indices: list[int]
    broken: list[Broken]

    def pin_memory(self) -> "LoadedBatch":
        """The same batch in page-locked memory; a DataLoader with `pin_memory=True` calls this."""
        return dataclasses.replace(self, crops=self.crops.pin_memory())


@dataclass(frozen=True)
class ViewDataset:
    """Make the crops of a whole micro-batch at once.

    A broken image is replaced by another, drawn from (seed, epoch, index) like everything else; the crops are
    drawn for the sample whose place it takes. Images in `cache` are not decoded again, and of a large TIFF in a folder only
    the tiles under the crops are read.
    """

    source: Source | Stream
    spec: ViewSpec
    seed: int
    reading: Reading = PHOTOS
    cache: Cache | None = None

    def __getitems__(self, items: list[Item]) -> LoadedBatch:
        """Reads, decodes and crops.

        Raises:
            ValueError: an image and all that could replace it are broken.
        """
        # A DataLoader would move the crops to shared memory later, in a thread whose errors are lost: the run would hang.
        crops = allocate(self.spec, len(items), shared=get_worker_info() is not None)
        broken: list[Broken] = []
        for position, item in enumerate(items):
            image, views = self._image(item, broken)
            write_sample(crops, position, image, views)
        return LoadedBatch(crops, [item.index for item in items], broken)

    def _image(self, item: Item, broken: list[Broken]) -> tuple[Pixels, Draw]:
        """An image, or what the crops cut out of it, and the draw; names in `broken` what had to be passed over."""
        found: list[Broken] = []
        for attempt in range(1 + _SUBSTITUTES):
            try:
                image = self._pixels(item, attempt)
                views = draw(self.spec, self.seed, item.epoch, item.index, *image.shape[:2])
                if isinstance(image, LargeImage):
                    cut = [self.reading.fitted(crop, image.name) for crop in image.crops(views.crops)]
            except BrokenImage as error:
                found.append(Broken(error.name, error.reason))
            else:
                broken += found
                return (cut if isinstance(image, LargeImage) else image), views
        raise ValueError(
            f"data.path: {len(found)} images of {self.source.name!r} in a row cannot be used: "
            f"{'; '.join(f'{name}: {reason}' for name, reason in found[:3])}; ... (`clove-hub check` with a folder lists all)"
        )

    def _pixels(self, item: Item, attempt: int) -> NDArray[Any] | LargeImage:
        """(H, W, C) of the item's own image at first, then of what may stand in for it."""
        if isinstance(self.source, Stream):
            assert item.image is not None
            encoded = item.image.read() if attempt == 0 else self.source.spare
            return self.reading.decode(encoded.data, encoded.name)
        index = item.index
        if attempt:
            draws = stream(self.seed, item.epoch, item.index, Purpose.SUBSTITUTE).bit_generator
            index = int(draws.random_raw(attempt)[-1] % np.uint64(len(self.source)))
        kept = self.cache.get(index) if self.cache else None
        if kept is not None:
            return kept
        if isinstance(self.source, Folder) and (large := open_large(self.source.path(index), self.reading.draft)):
            return large
        encoded = self.source.read(index)
        image = self.reading.decode(encoded.data, encoded.name)
        if self.cache:
            self.cache.put(index, image)
        return image


# ---- the loader ------------------------------------------------------------------------------------------


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
    draft: int | Literal["auto"] | None = None,
    cache: bool = False,
    skip: Sequence[tuple[int, int]] | None = None,
    minutes: float = 30.0,
) -> Iterator[LoadedBatch]:
    """The micro-batches of one process for the steps from `start_step` to `stop_step`, in order.

    `draft`, `cache` and `skip` are those of the recipe's `data` section (see `DataSettings`), `minutes` that of
    `open_loader`.

    Raises:
        ValueError: the global batch does not divide, or is larger than the source; `draft` is smaller than a view;
            the decoded images do not fit in memory, or the workers cannot share them.
    """
    largest = max(view.size for view in spec.views)
    if draft == "auto":
        draft = enough(spec)
        log.info("data.draft=auto: JPEGs are decoded with a short side of at least %d pixels", draft)
    if draft is not None and draft < largest:
        raise ValueError(
            f"data.draft={draft} is smaller than the largest view ({largest} pixels): even a crop of the whole image would be "
            f"enlarged. Give at least {largest}, or auto"
        )
    if cache and workers and sys.platform != "linux":
        raise ValueError(
            "data.cache=true needs workers that share the memory of the training process, as on Linux: "
            "set data.workers=0 or leave data.cache off"
        )
    reading = Reading(spec.bands, spec.depth, draft)
    if reading.of_photos:
        log.info("JPEGs are decoded by %s", fast_jpeg()[1])  # tried here, once, before the workers are forked
    kept = open_cache(source, reading) if cache and not isinstance(source, Stream) else None
    order = EpochOrder(source, seed, global_batch)
    sampler = StepSampler(order, global_batch, micro_batch, rank, world, start_step, stop_step, skip)
    value = 1 if spec.depth == 8 else 4
    batch_bytes = sum(value * spec.bands * view.size**2 for view in spec.views) * micro_batch
    return open_loader(
        ViewDataset(source, spec, seed, reading, kept), sampler, workers, pin_memory, batch_bytes, minutes
    )


def advise_draft(source: Source | Stream, spec: ViewSpec) -> None:
    """Advise `data.draft` if a few sampled JPEGs have far more pixels than the crops need."""
    if isinstance(source, Stream):
        return
    whole = drafted = 0
    for index in np.linspace(0, len(source) - 1, min(len(source), _LOOKED_AT)).astype(int).tolist():
        with suppress(BrokenImage):
            data = source.read(index).data
            whole, drafted = whole + pixel_bytes(data), drafted + pixel_bytes(data, enough(spec))
    if whole >= 2 * drafted > 0:
        log.info(
            "%s has JPEGs of more pixels than the smallest crops need: data.draft=auto decodes one in %.2g of them",
            *(source.name, whole / drafted),
        )


def enough(spec: ViewSpec) -> int:
    """The short side in pixels at which the smallest crop of a square image has as many pixels as its view, a side."""
    sides = [view.size / math.sqrt(view.scale[0] * min(view.ratio[0], 1 / view.ratio[1])) for view in spec.views]
    return math.ceil(max(sides))
