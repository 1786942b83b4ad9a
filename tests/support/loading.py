"""A source of images in memory, and the loader over it."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from clove_hub.training.data import LoadedBatch, make_loader
from clove_hub.training.sources import Encoded, Source, Stream
from clove_hub.training.sources.source import shuffled
from clove_hub.views import Jitter, View, ViewSpec

SPEC = ViewSpec(
    (
        View(size=24, scale=(0.2, 1.0), jitter=Jitter(), gray=0.2, blur=1.0),
        View(size=24, scale=(0.2, 1.0), jitter=Jitter(), blur=0.1, solarize=0.2),
        View(size=12, scale=(0.08, 0.3), jitter=Jitter(), blur=0.5),
    )
)


IMAGES = 26


SEED = 7


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (30 + number, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class InMemory:
    """A source whose images, good and broken, are given as bytes."""

    name = "in memory"
    fingerprint = "0" * 64

    def __init__(self, images: list[bytes]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return shuffled(seed, epoch, len(self))

    def read(self, index: int) -> Encoded:
        return Encoded(f"{index}.png", self.images[index])


def load(source: Source | Stream, start: int = 0, stop: int = 8, **changes: object) -> Iterator[LoadedBatch]:
    """Global batches of 8: three steps an epoch, and 2 of the 26 images left over."""
    settings = {"seed": SEED, "global_batch": 8, "micro_batch": 4, "rank": 0, "world": 1, "workers": 0}
    settings |= {"start_step": start, "stop_step": stop, "pin_memory": False}
    return make_loader(source, SPEC, **(settings | changes))


def assert_same(left: LoadedBatch, right: LoadedBatch) -> None:
    """Bit for bit: samples, crops, boxes, flips, colors and what was replaced."""
    assert left.indices == right.indices
    assert left.broken == right.broken
    for field in ("crops", "boxes", "flipped"):
        for one, other in zip(getattr(left.crops, field), getattr(right.crops, field), strict=True):
            assert torch.equal(one, other), field
    for one, other in zip(left.crops.color, right.crops.color, strict=True):
        for field, values in vars(one).items():
            np.testing.assert_array_equal(values, getattr(other, field), err_msg=field)


def samples(batches: Iterator[LoadedBatch]) -> Iterator[tuple[object, ...]]:
    """Every sample on its own, whatever batch it came in: index, and bytes of crops, boxes and colors."""
    for batch in batches:
        for position, index in enumerate(batch.indices):
            tensors = [*batch.crops.crops, *batch.crops.boxes, *batch.crops.flipped]
            arrays = [tensor.numpy() for tensor in tensors]
            arrays += [values for plan in batch.crops.color for values in vars(plan).values()]
            yield index, *(array[:, position].tobytes() for array in arrays)
