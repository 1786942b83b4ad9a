"""Clips of a video with a mask for each frame.

JPEGImages/480p/CLIP/00000.jpg, Annotations/480p/CLIP/00000.png, ImageSets/{2017,2016}/val.txt     DAVIS
JPEGImages/CLIP/..., Annotations/CLIP/..., val.txt                                                 one's own

A mask numbers the objects from 1; 0 is the background. In a clip whose first mask holds only 0 and 255, as in DAVIS
2016, 255 is the one object; in any other clip 255 is void, which counts as background.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .files import lines, pictures_by_name
from .images import read_image
from .masks import VOID, read_indices, same_size
from .values import some

log = logging.getLogger(__name__)


LISTS = ("ImageSets/2017/val.txt", "ImageSets/2016/val.txt", "val.txt")
"""Files that may name the clips, of which the first that is there counts."""


class Clip(NamedTuple):
    name: str
    frames: list[Path]
    masks: list[Path]


def find_clips(data: Path, limit: int | None) -> list[Clip]:
    """The clips that the list of the validation set names, a mask for each frame.

    Args:
        limit: at most this many frames of each clip, from its beginning.

    Raises:
        ValueError: a list, folder or mask is missing, or a clip has fewer than three frames.
    """
    listed = next((data / name for name in LISTS if (data / name).is_file()), None)
    if listed is None:
        raise ValueError(f"{data} has none of {', '.join(LISTS)}")
    size = "480p" if (data / "JPEGImages" / "480p").is_dir() else ""
    images, annotations = data / "JPEGImages" / size, data / "Annotations" / size
    # DAVIS's own list of 2016 has a line for each frame: /JPEGImages/480p/CLIP/00000.jpg ...
    names = dict.fromkeys(line.split()[0].rsplit("/", 2)[1] if "/" in line else line for line in lines(listed))
    clips = []
    for name in names:
        if not (images / name).is_dir():
            raise ValueError(f"the folder {images / name} is missing; {listed} names the clip")
        frames = sorted(pictures_by_name(images / name).values(), key=_in_time)[:limit]
        if len(frames) < 3:
            raise ValueError(
                f"{images / name} has {len(frames)} frames, expected at least 3: the first is given, and the last is not scored"
            )
        masks = [annotations / name / f"{frame.stem}.png" for frame in frames]
        if missing := [mask for mask in masks if not mask.is_file()]:
            raise ValueError(f"{len(missing)} masks are missing, the first is {missing[0]}")
        clips.append(Clip(name, frames, masks))
    present = {path.name for path in images.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if others := sorted(present - set(names)):
        log.info("%s: %d clips are not in %s and are left out: %s", data, len(others), listed.name, some(others))
    return clips


def _in_time(path: Path) -> list[tuple[str, int]]:
    """Orders 2.jpg before 10.jpg."""
    return [(text, int(digits or -1)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", path.stem)]


def read_objects(clip: Clip) -> list[NDArray[np.uint8]]:
    """The objects of all frames, uint8 (H, W): numbers from 1 without a gap, in the order of the first mask's numbers.

    Raises:
        ValueError: a frame or mask cannot be read or has another size, or the first mask has no object, or not all.
    """
    height, width = read_image(clip.frames[0]).shape[:2]
    found = []
    for path, frame in zip(clip.masks, clip.frames, strict=True):
        mask = read_indices(path)
        same_size(path, mask, frame, (width, height))
        found.append(mask)
    numbers = [number for number in np.unique(found[0]).tolist() if number]
    if numbers != [VOID]:
        numbers = [number for number in numbers if number != VOID]
    if not numbers:
        raise ValueError(f"{clip.masks[0]} has no object: the first mask of a clip must show the objects to follow")
    if len(numbers) >= VOID:
        raise ValueError(f"{clip.masks[0]} has {len(numbers)} objects; at most {VOID - 1} can be followed")
    late = {number for mask in found for number in np.unique(mask).tolist()} - {0, VOID, *numbers}
    if late:
        raise ValueError(f"the clip {clip.masks[0].parent} has the object {max(late)}, which its first mask lacks")
    table = np.zeros(max(VOID, *numbers) + 1, dtype=np.uint8)
    table[numbers] = np.arange(1, len(numbers) + 1)
    return [table[mask] for mask in found]
