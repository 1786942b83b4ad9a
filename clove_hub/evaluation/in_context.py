"""Each patch gets the classes of the nearest patches of the training images: in-context scene understanding.

Balažević et al., "Towards In-context Scene Understanding" (NeurIPS 2023), as open-hummingbird-eval (Pariza et al.)
evaluates it. The memory of patches is on disk, because it may hold ten million, and is read once per group of test
images.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clove_hub.data.mask_classes import ADE20K
from clove_hub.data.masks import VOID, Pair, Segmented, open_segmented
from clove_hub.runs import write_whole
from clove_hub.views import Purpose, stream

from ..weights.backbone import Backbone
from .augment import jittered, random_box
from .kept import features_key, own_folder
from .processes import gather, share
from .progress import tracked
from .reading import batches, each_readable, in_threads, normalized, resized
from .result import Outcome
from .scores import confusion, hungarian, merged, one_to_one, segmentation_scores, zero_miou
from .segmenting import classes_at, nearest, outcome, readable_part, whole_side
from .unfinished import in_words, once

VERSION = 1
RULE = "hummingbird"
RANDOMNESS = "the crops of the training images, and which of their patches are kept"
PREPROCESSING = ("mean", "std")
_SCALES = (0.5, 2.0)
_JITTER = 0.1
_ASKED = 64
"""Test images for which the memory is gone through once."""
_VALUES = 2**25
"""Values of features at once; of similarities twice as many."""
_WHOLE = 65535
"""What the share of a class that has a whole patch is stored as."""


@dataclass(frozen=True)
class Settings:
    levels: tuple[int, ...] = (-1,)
    """Feature levels, concatenated: -1 is the last (layer4 of a ResNet), -2 the one before."""
    size: int = 512
    """Side of all images in pixels; reduced to a multiple of the patch size (504 for 14 pixels)."""
    memory: int = 10_240_000
    """Patches to keep of all training images, the same number of each."""
    passes: int = 2
    """Passes over the training images, with different crops each time."""
    neighbors: int = 30
    """Patches of the memory from which a patch gets its classes."""
    temperature: float = 0.02
    """Divides their cosines before the softmax."""
    seeds: int = 1
    """Number of memories, with the given seed and the following ones."""
    batch: int = 16
    """Images in one forward pass."""
    train: str = "train"
    """Name of the training split, which fills the memory."""
    test: str = "val"
    """Name of the test split."""
    train_images: int | None = None
    """At most this many, spread evenly over the list; null for all."""
    test_images: int | None = None
    """Like `train_images`, for the test split."""

    def __post_init__(self) -> None:
        counts = (self.size, self.memory, self.passes, self.neighbors, self.seeds, self.batch, len(self.levels))
        limits = [limit for limit in (self.train_images, self.test_images) if limit is not None]
        if min(*counts, *limits) < 1 or self.temperature <= 0:
            raise ValueError(f"{self}: all must be positive, with at least one level")


def evaluate(backbone: Backbone, data: Path, settings: Settings, seed: int) -> Outcome:
    """`mIoU`, the same without the matching that the released code does first, and `pixel accuracy`, in percent.

    Args:
        data: images with a mask each, in one of the layouts of `open_segmented`.

    Raises:
        ValueError: SciPy is not installed, or something is wrong with the data.
    """
    hungarian()  # a missing SciPy should raise before anything is computed
    train = _with_other(open_segmented(data, settings.train).spread(settings.train_images))
    test = _with_other(open_segmented(data, settings.test).spread(settings.test_images))
    side = whole_side(backbone, settings.size)
    blank = torch.zeros(1, len(backbone.preprocessing.mean), side, side)
    _, *shape = backbone.joined(blank, settings.levels).shape  # a model that does not fit should raise first
    train, unread = readable_part(backbone.preprocessing, data, train, settings.train)
    test, unread_tests = readable_part(backbone.preprocessing, data, test, settings.test)
    seeds, files = (
        list(range(seed, seed + settings.seeds)),
        [path for pair in train.pairs + test.pairs for path in pair],
    )
    shown = f"in-context {settings} {train} {test}"

    def matrix_of(number: int) -> Tensor:
        with own_folder(features_key(backbone, data, files, f"{shown} {number}")) as folder:
            with in_words(folder):
                memory = remembered(backbone, train, settings, side, shape, number, folder)
            return asked(backbone, data, test, settings, side, memory)

    with own_folder(features_key(backbone, data, files, f"{shown} from {seed}")) as results:
        matrices = [once(results / f"{number}.matrix", partial(matrix_of, number)) for number in seeds]
    scores = [_scores(matrix) for matrix in matrices]
    return outcome(data, [train, test], settings.test, seeds, scores, matrices, unread + unread_tests)


def _with_other(part: Segmented) -> Segmented:
    """ADE20K with a class of its own for what has none of the 150, as the released code has it."""
    if part.classes != ADE20K:
        return part
    return replace(part, classes=("other", *ADE20K), values={value: value for value in range(len(ADE20K) + 1)})


def _scores(matrix: Tensor) -> dict[str, float]:
    return {
        "mIoU": zero_miou(merged(matrix, one_to_one(matrix))),
        "mIoU unmatched": zero_miou(matrix),
        "pixel accuracy": segmentation_scores(matrix)["pixel accuracy"],
    }


# ---- the memory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """N patches in two files."""

    folder: Path
    patches: int
    channels: int
    classes: int

    @property
    def features(self) -> Path:
        """Unit vectors in half precision (N, C)."""
        return self.folder / "features.half"

    @property
    def shares(self) -> Path:
        """The share of each class among a patch's pixels, uint16 (N, K), in units of which 65535 are one."""
        return self.folder / "shares.uint16"

    def make_files(self) -> Memory:
        """Create the files at full size; return itself.

        Raises:
            ValueError: the disk is full.
        """
        sizes = {self.features: 2 * self.patches * self.channels, self.shares: 2 * self.patches * self.classes}
        needed = sum(sizes.values()) - sum(path.stat().st_size for path in sizes if path.exists())
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise ValueError(
                f"a memory of {self.patches} patches with {self.channels} channels needs {needed / 1e9:.1f} GB on disk, and "
                f"{self.folder} has {free / 1e9:.1f} GB: set XDG_CACHE_HOME to a folder with enough space, or lower memory"
            )
        for path, size in sizes.items():
            with path.open("ab") as file:
                file.truncate(size)
        return self

    def put(self, first: int, features: Tensor, shares: Tensor) -> None:
        """Stores patches, from number `first` on: unit vectors (n, C) and shares of the classes (n, K)."""
        stored = (shares.double() * _WHOLE).round().cpu().numpy().astype(np.uint16)
        for path, rows in ((self.features, features.half().cpu().numpy()), (self.shares, stored)):
            with path.open("r+b", buffering=0) as file:
                file.seek(first * rows[0].nbytes)
                file.write(np.ascontiguousarray(rows).data.cast("B"))

    def blocks(self, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """The number of the first patch of each block, and their features, float32 (n, C)."""
        size = max(_VALUES // self.channels, 1)
        for first in range(0, self.patches, size):
            count = min(size, self.patches - first) * self.channels
            half = np.fromfile(self.features, np.float16, count, offset=2 * first * self.channels)
            yield first, torch.from_numpy(half).view(-1, self.channels).to(device).float()

    def shares_of(self, numbers: Tensor) -> Tensor:
        """The shares of the classes in some patches: int64 (n,) -> float32 (n, K)."""
        stored = np.memmap(self.shares, np.uint16, "r", shape=(self.patches, self.classes))
        return torch.from_numpy(stored[numbers.cpu().numpy()].astype(np.float32) / _WHOLE)


def remembered(
    backbone: Backbone,
    part: Segmented,
    settings: Settings,
    side: int,
    shape: Sequence[int],
    seed: int,
    folder: Path,
) -> Memory:
    """Patches of all images, in all passes. All processes must call it, with the same folder.

    Args:
        side: of the images, in pixels.
        shape: of the feature map of one, (C, h, w).

    Raises:
        ValueError: the memory is too small, or there is no room on the disk.
    """
    channels, height, width = shape
    seen, classes, images = backbone.preprocessing, len(part.classes), settings.passes * len(part.pairs)
    each = min(settings.memory // images, height * width)
    if not each:
        raise ValueError(
            f"memory={settings.memory} holds less than one patch of each of {len(part.pairs)} images in {settings.passes} "
            f"passes: set it to {images} or more, or lower passes or train_images"
        )
    memory = Memory(folder, images * each, channels, classes)
    gather(map(Memory.make_files, share([memory])))
    units = [range(start, min(start + settings.batch, images)) for start in range(0, images, settings.batch)]

    def load(number: int) -> tuple[Tensor, Tensor, Tensor]:
        turn, place = divmod(number, len(part.pairs))
        random = stream(seed, turn, place, Purpose.VIEWS)
        photo, mask = _crop(seen.reading.levels(part.pairs[place][0]), part.mask(part.pairs[place]), side, random)
        pixels = normalized(photo.permute(1, 2, 0).numpy(), seen.mean, seen.std)
        return pixels, mask, torch.from_numpy(random.random(height * width, dtype=np.float32))

    def own() -> Iterator[None]:
        todo = [unit for unit in share(units) if not (folder / f"{unit[0]}.done").exists()]
        loads = in_threads(load, todo)
        for unit, loaded in zip(todo, tracked(loads, f"filling the memory, seed {seed}", len(todo)), strict=True):
            features = backbone.joined(torch.stack([one for one, _, _ in loaded]), settings.levels).float()
            vectors = features.flatten(2).transpose(1, 2)  # (B, h * w, C)
            for number, cells, (_, mask, uniform) in zip(unit, vectors, loaded, strict=True):
                shares = class_shares(mask, (height, width), classes)
                kept = least_common(shares, uniform, each)
                memory.put(number * each, F.normalize(cells[kept.to(cells.device)], dim=1), shares[kept])
            write_whole(folder / f"{unit[0]}.done", "")
        yield from [None] * len(share(units))

    gather(own())
    return memory


def _crop(
    photo: NDArray[Any], mask: NDArray[np.uint8], side: int, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A random part of a photo (H, W, C) with jittered colors, (C, side, side), and of its mask, uint8 (side, side)."""
    pixels = jittered(torch.from_numpy(photo.astype(np.float32)).permute(2, 0, 1), _JITTER, random)
    left, top, width, height = random_box(photo.shape[1], photo.shape[0], _SCALES, random)
    pixels = pixels[None, :, top : top + height, left : left + width]
    pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)[0]
    return pixels, nearest(torch.from_numpy(mask[top : top + height, left : left + width]), (side, side))


def class_shares(mask: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """The share of each class among the pixels of each cell: (H, W) -> float32 (h * w, K), cells in row-major order.

    Void pixels count as class 0, as in the released code.
    """
    rows, columns = (torch.arange(side) * cells // side for side, cells in zip(mask.shape, grid, strict=True))
    cell = rows[:, None] * grid[1] + columns
    known = torch.where(mask == VOID, 0, mask.long())
    counts = torch.bincount((cell * classes + known).flatten(), minlength=grid[0] * grid[1] * classes)
    counts = counts.view(-1, classes).float()
    return counts / counts.sum(1, keepdim=True)


def least_common(shares: Tensor, uniform: Tensor, count: int) -> Tensor:
    """The cells of an image to remember, favoring those of rare classes, at random: int64 (count,).

    Args:
        shares: of the classes in each cell, (N, K).
        uniform: random numbers, (N,).
    """
    present = (shares > 0).float()
    return (present @ present.sum(0) * uniform).topk(count, largest=False).indices.sort().values


# ---- queries ---------------------------------------------------------------------------------------------------------


def asked(backbone: Backbone, data: Path, part: Segmented, settings: Settings, side: int, memory: Memory) -> Tensor:
    """The confusion matrix (K, K) of all pixels of the images resized to `side` x `side`. All processes must call it.

    Intermediate results are saved beside the memory.
    """
    seen = backbone.preprocessing

    def load(pair: Pair) -> tuple[Tensor, Tensor]:
        photo = resized(
            seen.reading.levels(pair[0]), lambda whole: whole.resize((side, side), Image.Resampling.BILINEAR)
        )
        return normalized(photo, seen.mean, seen.std), nearest(torch.from_numpy(part.mask(pair)), (side, side))

    def work(loaded: list[tuple[Tensor, Tensor]]) -> Tensor:
        maps = torch.cat(
            [
                backbone.joined(torch.stack([pixels for pixels, _ in some]), settings.levels).float().cpu()
                for some in batches(loaded, settings.batch)
            ]
        )
        queries = F.normalize(maps.flatten(2).transpose(1, 2), dim=2).flatten(0, 1)  # (B * h * w, C)
        cosines, numbers = neighbors(queries.to(backbone.device), memory, settings.neighbors)
        matrix = torch.zeros(memory.classes, memory.classes, dtype=torch.int64)
        grid, cells = maps.shape[2:], maps.shape[2] * maps.shape[3]
        for image, (_, mask) in enumerate(loaded):
            own = slice(image * cells, (image + 1) * cells)
            labels = vote(cosines[own].cpu(), memory.shares_of(numbers[own].flatten()), settings.temperature)
            matrix += confusion(classes_at(labels.T.reshape(-1, *grid), (side, side)), mask, memory.classes)
        return matrix

    matrices, _, _ = each_readable(part.pairs, load, work, _ASKED, data, memory.folder / "asked")
    return torch.stack(matrices).sum(0)


def neighbors(queries: Tensor, memory: Memory, count: int) -> tuple[Tensor, Tensor]:
    """Cosines and numbers of the patches nearest to each query: (Q, C) -> (Q, count) and int64 (Q, count), best first."""
    best: list[tuple[Tensor, Tensor]] = []
    parts: tuple[Tensor, ...] = ()
    for first, block in memory.blocks(queries.device):
        if not parts:
            parts = torch.split(queries, max(2 * _VALUES // len(block), 1))
        for place, part in enumerate(parts):
            cosines, numbers = (part @ block.T).topk(min(count, len(block)), dim=1)
            numbers = numbers + first
            if place == len(best):
                best.append((cosines, numbers))
                continue
            cosines, numbers = (torch.cat(pair, 1) for pair in zip(best[place], (cosines, numbers), strict=True))
            cosines, order = cosines.topk(min(count, cosines.shape[1]), dim=1)
            best[place] = cosines, numbers.gather(1, order)
    return torch.cat([cosines for cosines, _ in best]), torch.cat([numbers for _, numbers in best])


def vote(cosines: Tensor, shares: Tensor, temperature: float) -> Tensor:
    """The mean of the neighbors' classes, the nearer ones counting more.

    Args:
        cosines: of the neighbors of each query, (Q, k).
        shares: of the classes in each neighbor, (Q * k, K).

    Returns:
        (Q, K)
    """
    weights = (cosines / temperature).softmax(1)
    return torch.einsum("qn,qnk->qk", weights, shares.view(*cosines.shape, -1))
