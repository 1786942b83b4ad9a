"""The paths of annotations and images in a data set in COCO's format.

    FOLDER/annotations/instances_{train,val}.json          or COCO's own instances_{train,val}2017.json
    FOLDER/annotations/person_keypoints_{train,val}.json   or ...2017.json
    FOLDER/{train,val}/*.jpg                               or {train,val}2017/, images/{train,val}/, images/
    FOLDER/{train,valid}/_annotations.coco.json            beside the images, as Roboflow exports it

If there are several, the first is used.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .values import some


def layout(folder: Path, split: str, stem: str) -> tuple[Path, Path]:
    """The annotation file and the folder of its images.

    Args:
        split: `train` or `val`.
        stem: `instances` or `person_keypoints`.

    Raises:
        ValueError: one of them is missing.
    """
    named = [f"annotations/{stem}_{split}{year}.json" for year in ("", "2017")]
    splits = [split, *(["valid"] if split == "val" else [])]
    roboflow = [f"{name}/_annotations.coco.json" for name in splits]
    for name in (*named, *roboflow):
        if (folder / name).is_file():
            break
    else:
        others = [path.relative_to(folder).as_posix() for path in sorted(folder.glob("**/*.json"))]
        raise ValueError(
            f"{folder} has neither {' nor '.join((*named, *roboflow))}: expected a folder in COCO's format, with "
            "annotations/*.json and the images of each split in a folder of its name"
            + (f"; it has {some(others)}" if others else "")
        )
    places = [split, f"{split}2017", f"images/{split}", f"images/{split}2017", "images", *splits[1:]]
    found = [folder / place for place in places if (folder / place).is_dir()]
    if name in roboflow:
        found = [(folder / name).parent]
    if not found:
        raise ValueError(f"{folder} has neither {' nor '.join(places)}: one of these folders must hold the images")
    return folder / name, found[0]


def listed_files(names: Sequence[str], folder: Path, path: Path) -> list[Path]:
    """The images in a folder and its subfolders, whatever exporters add to a name: folders, a drive, a URL.

    Args:
        names: the names in the annotation file at `path`.

    Raises:
        ValueError: an image is missing, or listed more than once.
    """
    present = {
        (Path(place) / name).relative_to(folder).as_posix() for place, _, files in os.walk(folder) for name in files
    }
    by_name: dict[str, list[str]] = {}
    for place in present:
        by_name.setdefault(place.rpartition("/")[2], []).append(place)

    def find(name: str) -> str | None:
        if name in present or (".." not in name and (folder / name.lstrip("/")).is_file()):  # in a linked folder
            return name.lstrip("/")
        plain = name.replace("\\", "/")
        forms = [plain, unquote(urlsplit(plain).path if "://" in plain else plain)]
        for parts in (form.strip("/").split("/") for form in forms):
            tails = ("/".join(parts[start:]) for start in range(len(parts)))
            if (found := next((tail for tail in tails if tail in present), None)) is not None:
                return found
        places = {place for form in forms for place in by_name.get(form.rpartition("/")[2], ())}
        return places.pop() if len(places) == 1 else None

    found = [find(name) for name in names]
    if absent := [name for name, place in zip(names, found, strict=True) if place is None]:
        raise ValueError(f"{folder} lacks {len(absent)} of the {len(names)} images that {path} lists: {some(absent)}")
    if twice := [place for place, count in Counter(found).items() if count > 1]:
        raise ValueError(f"{path} lists {len(twice)} images more than once, such as {twice[0]}: give each file one row")
    return [folder / place for place in found if place is not None]
