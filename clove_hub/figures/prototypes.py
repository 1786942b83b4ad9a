"""The photos that are nearest to each prototype of a SlotCon run.

As in the released code's picture of slots, a cell belongs to the prototype that it is most similar to, and a photo's
nearness to a prototype is the average of the cells that belong to it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image as PillowImage
from torch import Tensor, nn

from clove_hub.data.images import read_image
from clove_hub.evaluation.reading import central_square, each_readable, normalized
from clove_hub.geometry import upsampled
from clove_hub.methods.slotcon import embed
from clove_hub.weights import Preprocessing

from ..weights import METHOD_SOURCE
from ..weights.backbone import finite
from .output import WIDTH
from .photos import add_photo_arguments, found_photos, read_method
from .sheet import Row, sheet
from .style import RED, Image, caption, faded, outlined

BATCH = 32
SHOWN = 8


class Tile(NamedTuple):
    """A photo that is near to a prototype."""

    image: Image
    mask: NDArray[np.bool_]
    """Where the prototype wins, (H, W)."""
    cosine: float
    """The mean of the cells that it wins."""


class Near(NamedTuple):
    """A prototype and the photos that are nearest to it, which may be fewer than asked for."""

    title: str
    tiles: list[Tile]


class Wins(NamedTuple):
    """What K prototypes win in N photos."""

    cosine: Tensor
    """The mean cosine of the cells that a prototype wins in a photo, -inf where it wins none: (N, K)."""
    cells: Tensor
    """How many cells it wins, (N, K)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=f"a SlotCon run: {METHOD_SOURCE}")
    parser.add_argument(
        "--prototypes",
        nargs="+",
        type=int,
        metavar="NUMBER",
        help="which prototypes, counted from 0 (default: the eight that win most cells)",
    )
    parser.add_argument("--top", type=int, default=6, help="photos for each prototype (default: 6)")
    add_photo_arguments(parser, photos=2000, size=224)


def draw(options: argparse.Namespace) -> Figure:
    """Finds the nearest photos of some prototypes and draws them.

    Raises:
        ValueError: it is no SlotCon run or has no checkpoint, there are no photos, or a number is out of range.
    """
    for name in ("top", "size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; expected at least 1")
    trained = read_method(options.run, "prototypes", ("slotcon",))
    teacher = Teacher(trained.method.teacher, trained.preprocessing, options.size)
    photos = found_photos(options.data, options.photos)
    with torch.no_grad():
        photos, wins = count_wins(teacher, photos)
        numbers = chosen_prototypes(wins, options.prototypes)
        rows = [nearest(teacher, photos, wins, number, options.top) for number in numbers]
    return nearest_photos(rows, options.top, options.width)


# ---- from a run to the nearest photos --------------------------------------------------------------------------------


class Teacher(NamedTuple):
    """The teacher of a SlotCon run, in eval mode, and what it looks at."""

    network: nn.ModuleDict
    preprocessing: Preprocessing
    size: int
    """Pixels a side of a photo's central square."""

    def square(self, photo: Path) -> PillowImage.Image:
        """As in the released code: the shorter side resized to 8 / 7 of what is cut out."""
        image = PillowImage.fromarray(read_image(photo))
        return central_square(image, round(self.size * 8 / 7), self.size, "bilinear")

    def scores(self, images: Sequence[PillowImage.Image]) -> Tensor:
        """The cosine of each cell to each prototype: B photos -> (B, K, h, w)."""
        seen = self.preprocessing
        pixels = torch.stack([normalized(image, seen.mean, seen.std) for image in images])
        scores: Tensor = self.network["prototypes"](embed(self.network, pixels))
        return finite(scores, "the teacher")


def count_wins(teacher: Teacher, photos: Sequence[Path]) -> tuple[list[Path], Wins]:
    """Lets the prototypes compete for the cells of all photos that can be read, which are returned first.

    Raises:
        ValueError: too many cannot be read.
    """
    parts, kept, _ = each_readable(photos, teacher.square, lambda squares: wins_of(teacher.scores(squares)), BATCH)
    wins = Wins(torch.cat([part.cosine for part in parts]), torch.cat([part.cells for part in parts]))
    return [photos[number] for number in kept], wins


def wins_of(scores: Tensor) -> Wins:
    """Each cell goes to its best prototype: (B, K, h, w) -> what the prototypes win in each photo."""
    won = torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), 1)
    cells = won.sum((2, 3))  # (B, K)
    cosine = (scores * won).sum((2, 3)) / cells.clamp(min=1)
    return Wins(cosine.where(cells > 0, -torch.inf), cells)


def chosen_prototypes(wins: Wins, asked: Sequence[int] | None) -> list[int]:
    """Those asked for, or the eight that win most cells."""
    total = wins.cells.sum(0)  # (K,)
    if asked is None:
        order = total.argsort(descending=True, stable=True)
        return [number for number in order[:SHOWN].tolist() if total[number] > 0]
    if wrong := [number for number in asked if not 0 <= number < len(total)]:
        raise ValueError(f"--prototypes {wrong[0]}: the run has {len(total)}, numbered from 0 to {len(total) - 1}")
    return list(asked)


def nearest(teacher: Teacher, photos: Sequence[Path], wins: Wins, number: int, top: int) -> Near:
    """The photos that are nearest to a prototype, with what it wins in them."""
    cosine, order = wins.cosine[:, number].sort(descending=True, stable=True)
    tiles = []
    for value, place in zip(cosine[:top].tolist(), order[:top].tolist(), strict=True):
        if value > -torch.inf:
            image = teacher.square(photos[place])
            mask = won_pixels(teacher.scores([image])[0], number, teacher.size)
            tiles.append(Tile(np.array(image), mask, value))
    cells = wins.cells[:, number]
    share = 100 * float(cells.sum() / wins.cells.sum())
    count = int((cells > 0).sum())
    return Near(
        f"prototype {number}: wins {share:.1f} % of the cells, in {count} photo{'' if count == 1 else 's'}", tiles
    )


def won_pixels(scores: Tensor, number: int, size: int) -> NDArray[np.bool_]:
    """Where a prototype's score is the greatest after bilinear resizing: (K, h, w) -> (size, size)."""
    best, winner = torch.full((size, size), -torch.inf), torch.zeros(size, size, dtype=torch.int64)
    for start in range(0, len(scores), 256):  # thousands of maps of full size would fill the memory
        value, place = upsampled(scores[start : start + 256], (size, size)).max(0)
        winner = torch.where(value > best, start + place, winner)
        best = best.maximum(value)
    won: NDArray[np.bool_] = (winner == number).numpy()
    return won


# ---- the picture -----------------------------------------------------------------------------------------------------


def nearest_photos(prototypes: Sequence[Near], columns: int, width: float = WIDTH) -> Figure:
    """A row for each prototype: its nearest photos, gray and pale where it does not win."""
    note = "In each photo: the mean cosine to the prototype of the cells that it wins, which are outlined."
    rows = [Row([1] * columns, one.title) for one in prototypes]
    on = sheet(rows, width, note)
    for one, panels in zip(prototypes, on.panels, strict=True):
        for axes, tile in zip(panels, one.tiles, strict=False):
            axes.imshow(faded(tile.image, tile.mask))
            outlined(axes, tile.mask, RED, 1.2)
            caption(axes, f"{tile.cosine:.2f}")
    return on.figure
