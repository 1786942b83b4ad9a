"""SPair-71k: pairs of photos of one category, and keypoints that mark the same part in both (Min et al. 2019).

JPEGImages/CATEGORY/NAME.jpg                 the photos
Layout/large/{test,val,trn}.txt              NUMBER-SOURCE-TARGET:CATEGORY in each line
PairAnnotation/{test,val,trn}/LINE.json      points, sizes, and the box of the object in both photos
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clove_hub.documents import read_object

from .files import lines
from .values import label, numbers, some

Points = NDArray[np.float64]
"""(K, 2): x and y in pixels."""


@dataclass(frozen=True)
class View:
    """One photo of a pair."""

    photo: Path
    size: tuple[int, int]
    """Width and height, which the points are measured in."""
    points: Points
    box: tuple[float, float, float, float]
    """Of the object: x0, y0, x1, y1 in pixels."""


@dataclass(frozen=True)
class PhotoPair:
    annotation: Path
    category: str
    source: View
    target: View


def read_pairs(root: Path, split: str) -> list[PhotoPair]:
    """The pairs of a split in the order of its list, or of their files' names where there is no list.

    Raises:
        ValueError: there is no such split, or an annotation or photo is missing or malformed; the message names which.
    """
    folder, listed = root / "PairAnnotation" / split, root / "Layout" / "large" / f"{split}.txt"
    if not folder.is_dir():
        found = sorted(path.name for path in (root / "PairAnnotation").glob("*") if path.is_dir())
        there = f"it has the splits {some(found)}" if found else "expected SPair-71k"
        raise ValueError(f"{folder} is missing, the annotations of the split {split!r}: {there}")
    paths = [folder / f"{line}.json" for line in lines(listed)] if listed.is_file() else sorted(folder.glob("*.json"))
    if not paths:
        raise ValueError(f"{folder} has no NUMBER-SOURCE-TARGET:CATEGORY.json")
    pairs = [_read(path, root / "JPEGImages") for path in paths]
    photos = {view.photo for pair in pairs for view in (pair.source, pair.target)}
    if missing := sorted(photo for photo in photos if not photo.is_file()):
        raise ValueError(f"{len(missing)} photos are missing, the first is {missing[0]}")
    return pairs


def _read(path: Path, photos: Path) -> PhotoPair:
    document = read_object(path)
    category = label(document.get("category"))
    if not category:
        raise ValueError(f"{path} has no category")
    source, target = (_view(document, key, path, photos / category) for key in ("src", "trg"))
    if len(source.points) != len(target.points):
        raise ValueError(
            f"{path} has {len(source.points)} points in the source and {len(target.points)} in the target: "
            "each point of one belongs to the same point of the other"
        )
    return PhotoPair(path, category, source, target)


def _view(document: Mapping[str, Any], key: str, path: Path, photos: Path) -> View:
    name, size, box = (document.get(f"{key}_{what}") for what in ("imname", "imsize", "bndbox"))
    points, sides, corners = document.get(f"{key}_kps"), numbers(size), numbers(box)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{path} has no {key}_imname, the name of a photo in {photos}")
    if not sides or len(sides) < 2 or min(sides[:2]) < 1:
        raise ValueError(f"{path} has {key}_imsize {size!r}; expected width and height")
    if not corners or len(corners) != 4 or corners[0] >= corners[2] or corners[1] >= corners[3]:
        raise ValueError(f"{path} has {key}_bndbox {box!r}; expected x0, y0, x1, y1 with x0 < x1 and y0 < y1")
    places = [numbers(point) for point in points] if isinstance(points, list) else []
    if not places or any(place is None or len(place) != 2 for place in places):
        raise ValueError(f"{path} has {key}_kps {points!r:.80}; expected a list with x and y of each point")
    x0, y0, x1, y1 = corners
    return View(photos / name, (int(sides[0]), int(sides[1])), np.array(places, dtype=np.float64), (x0, y0, x1, y1))
