"""Photos with a depth map each, a 16-bit PNG.

nyu_train.txt, nyu_test.txt, SCENE/rgb_00045.jpg, SCENE/sync_depth_00045.png     NYUv2, as the Monocular Depth Toolbox
    and BTS have it: `PHOTO MAP FOCAL` in each line, paths from the folder, which may begin with a slash; a map called None
    is none. 1000 units are a meter.
images/NAME.jpg, depth/NAME.png, train.txt, test.txt, depth.json     one's own: {"scale": 1000}, the units of a meter; 1000
    where there is no depth.json

0 means that the distance is not known.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clove_hub.documents import read_object

from .files import lines, pictures_by_name, spread
from .masks import read_indices, same_size
from .values import number, some

log = logging.getLogger(__name__)

Pair = tuple[Path, Path]
"""A photo and its map."""
MILLIMETERS = 1000.0


@dataclass(frozen=True)
class Distances:
    """The images of one split."""

    pairs: list[Pair]
    scale: float
    """Units of a map in a meter."""
    kinect: bool
    """Whether the maps are NYUv2's, which have no values along the border."""

    def meters(self, pair: Pair, size: tuple[int, int]) -> NDArray[np.float32]:
        """The distance of each pixel, (H, W); 0 where it is not known.

        Args:
            size: width and height of the upright photo, which the map must have too.

        Raises:
            ValueError: the map is damaged, is no image of whole numbers, or has another size.
        """
        found = read_indices(pair[1])
        same_size(pair[1], found, pair[0], size)
        meters: NDArray[np.float32] = found.astype(np.float32) / np.float32(self.scale)
        return meters

    def of(self, kept: Sequence[int]) -> Distances:
        """The images with these numbers."""
        return replace(self, pairs=[self.pairs[number] for number in kept])

    def spread(self, limit: int | None) -> Distances:
        """At most `limit` of the images, spread evenly over the list."""
        return replace(self, pairs=spread(self.pairs, limit))


def open_distances(root: Path, split: str) -> Distances:
    """Finds the images of a split and their maps, whichever the layout is.

    Raises:
        ValueError: it is none of the layouts, there is no such split, or a photo or map is missing.
    """
    if (listed := root / f"nyu_{split}.txt").is_file():
        return Distances(_present(_nyu(root, listed), listed), MILLIMETERS, True)
    if lists := sorted(path.stem.removeprefix("nyu_") for path in root.glob("nyu_*.txt")):
        raise ValueError(f"{listed} is missing; {root} has the lists of {some(lists)}")
    images, maps, listed = root / "images", root / "depth", root / f"{split}.txt"
    if not images.is_dir() or not maps.is_dir():
        raise ValueError(
            f"{root} has none of the layouts for depth: nyu_train.txt and nyu_test.txt (NYUv2); images/, depth/ and {split}.txt"
        )
    photos = pictures_by_name(images)
    names = lines(listed)
    if absent := [name for name in names if name not in photos]:
        raise ValueError(f"{images / absent[0]}.* is missing; {listed.name} names it")
    return Distances(_present([(photos[name], maps / f"{name}.png") for name in names], listed), _scale(root), False)


def _nyu(root: Path, listed: Path) -> list[Pair]:
    pairs, unknown = [], 0
    for line in lines(listed):
        photo, distance, *_ = [*line.split(), "", ""]
        if not distance:
            raise ValueError(f"{listed} has the line {line!r}; expected a photo, a map and the focal length")
        if distance == "None":
            unknown += 1
        else:
            pairs.append((root / photo.lstrip("/"), root / distance.lstrip("/")))
    if unknown:
        log.info("%s: %d photos have no map and are left out", listed, unknown)
    return pairs


def _scale(root: Path) -> float:
    path = root / "depth.json"
    if not path.is_file():
        return MILLIMETERS
    given = read_object(path).get("scale")
    scale = number(given)
    if scale is None or scale <= 0:
        raise ValueError(
            f'{path} has the scale {given!r}; expected the units of a meter, {{"scale": 1000}} for millimeters'
        )
    return scale


def _present(pairs: list[Pair], listed: Path) -> list[Pair]:
    if not pairs:
        raise ValueError(f"{listed} names no photo with a map")
    if missing := [path for pair in pairs for path in pair if not path.is_file()]:
        raise ValueError(f"{len(missing)} of the files that {listed} names are missing, the first is {missing[0]}")
    return pairs
