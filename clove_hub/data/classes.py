"""Images with one class each, in a folder for each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .images import photos_beneath


@dataclass(frozen=True)
class Labeled:
    """Images with one class each."""

    photos: list[Path]
    labels: list[int]
    classes: list[str]
    absent: tuple[str, ...] = ()
    """Classes without an image."""


def class_folders(folder: Path, classes: Sequence[str] | None = None) -> Labeled:
    """Images in a sub-folder for each class.

    Args:
        classes: those that there must be, in their order; all sub-folders by name if not given.

    Raises:
        ValueError: there is no such folder or no image, one is there that `classes` lacks, or a class is empty though
            `classes` is not given.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is missing: expected DATA/train and DATA/val, each with a sub-folder for each class"
        )
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise ValueError(f"{folder} has no sub-folders; expected one with images for each class")
    if classes is not None and (odd := sorted(set(found) - set(classes))):
        raise ValueError(f"the class {folder / odd[0]} is not among those of the training images")
    photos: list[Path] = []
    labels: list[int] = []
    absent: list[str] = []
    classes = found if classes is None else list(classes)
    for label, name in enumerate(classes):
        if classes is not found and not (folder / name).is_dir():
            absent.append(name)
            continue
        own = photos_beneath(folder / name)
        photos += own
        labels += [label] * len(own)
    return Labeled(photos, labels, classes, tuple(absent))
