"""Images with one class each, in a folder for each class."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .finder import some_images, total

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labeled:
    """Images with one class each."""

    photos: list[Path]
    labels: list[int]
    classes: list[str]
    absent: tuple[str, ...] = ()
    """Classes without an image."""

    def of(self, kept: Sequence[int]) -> Labeled:
        """The images with these numbers.

        Raises:
            ValueError: a class has none of them.
        """
        photos, labels = [self.photos[number] for number in kept], [self.labels[number] for number in kept]
        if lost := set(self.labels) - set(labels):
            name = self.classes[min(lost)]
            raise ValueError(
                f"no image of the class {name!r} can be read, such as {self.photos[self.labels.index(min(lost))]}"
            )
        return Labeled(photos, labels, self.classes, self.absent)


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
    parts = []
    for label, name in enumerate(classes):
        if classes is not found and not (folder / name).is_dir():
            absent.append(name)
            continue
        parts.append(some_images(folder / name))
        photos += parts[-1].paths
        labels += [label] * len(parts[-1].names)
    log.info("%s: %s", folder, total(part.tally for part in parts))
    return Labeled(photos, labels, classes, tuple(absent))
