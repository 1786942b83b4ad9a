"""Find the images of a folder, count the other files, and read folders as classes."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .bands import MEASURED
from .images import EXTRAS, printable, readable_suffixes

log = logging.getLogger(__name__)

_SHOWN = 8  # endings of what was left out
ABSENT = -1
"""The size of a file that cannot be looked at."""
HIDDEN, SPECIAL, NO_ENDING = "hidden", "special (pipes, sockets, devices)", "without an ending"


@dataclass(frozen=True)
class Tally:
    """How many files were taken and left out, by lower-case ending or by what they are."""

    taken: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """`1200 images (1180 .jpg, 20 .png); left out: 40 .heic (needs pip install 'clove-hub[heic]'), 3 .txt`."""
        text = f"{self.taken.total()} images"
        if self.taken:
            text += f" ({', '.join(f'{count} {ending}' for ending, count in _sorted(self.taken))})"
        return f"{text}; left out: {self.others()}" if self.left_out else text

    def others(self) -> str:
        """What was left out, as text."""
        parts = [
            f"{count} {kind}" + (f" (needs pip install 'clove-hub[{EXTRAS[kind]}]')" if kind in EXTRAS else "")
            for kind, count in _sorted(self.left_out)
        ]
        if more := sum(count for _, count in _sorted(self.left_out)[_SHOWN:]):
            parts[_SHOWN:] = [f"{more} others"]
        return ", ".join(parts)


@dataclass(frozen=True)
class Found:
    """The images in a folder and its folders."""

    root: Path
    names: list[bytes]
    """Relative to the root, as the file system has them, in the order of their bytes."""
    tally: Tally
    folders: frozenset[str]
    """All that were listed, links resolved."""
    sizes: Sequence[int] = ()
    """Bytes of each, where they were asked for; ABSENT where the file cannot be looked at."""

    @property
    def paths(self) -> list[Path]:
        return [self.root / os.fsdecode(name) for name in self.names]


def find_images(root: Path, with_sizes: bool = False, suffixes: Collection[str] | None = None) -> Found:
    """Lists the images in a folder and the folders inside it.

    An image is a file with one of the endings of `readable_suffixes`, in any case. Links are followed, each folder
    once. Hidden files and folders (`.name`) are left out: they are thumbnails and leftovers of tools. So are named
    pipes, sockets and devices, which are never opened. A broken link counts as an unreadable image.

    Args:
        with_sizes: ask for each image's size as well, right after its folder was listed: a network file system has then
            sent it along with the names.
        suffixes: the endings of images, in lower case; None for those of photos.

    Raises:
        ValueError: there is no such folder, or it or a folder inside cannot be listed.
    """
    if not root.is_dir():
        raise ValueError(f"{printable(root)} is not a folder; expected one with images")
    suffixes = readable_suffixes() if suffixes is None else suffixes
    top = str(root)
    above = len(os.path.join(top, ""))
    names: list[bytes] = []
    sizes: list[int] = []
    tally = Tally()
    seen: set[str] = set()
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        if (real := os.path.realpath(folder)) in seen:  # a link back to a folder above would be followed forever
            continue
        seen.add(real)
        inner = []
        for entry in _entries(folder):
            if entry.name.startswith("."):
                tally.left_out[HIDDEN] += 1
                continue
            kind = _kind(entry)
            if kind == "folder":
                inner.append(entry.path)
                continue
            ending = os.path.splitext(entry.name)[1].lower()
            if kind == "special":
                tally.left_out[SPECIAL] += 1
            elif ending in suffixes:
                tally.taken[ending] += 1
                names.append(os.fsencode(entry.path[above:]))
                if with_sizes:
                    sizes.append(size_of(entry))
            elif entry.name != MEASURED:
                tally.left_out[ending if len(ending) > 1 else NO_ENDING] += 1
        waiting += sorted(inner, reverse=True)
    order = sorted(range(len(names)), key=names.__getitem__)
    return Found(
        root, [names[n] for n in order], tally, frozenset(seen), [sizes[n] for n in order] if with_sizes else ()
    )


def size_of(file: os.DirEntry[str] | Path) -> int:
    """Bytes of a file, links followed; ABSENT for what cannot be looked at. One look, and nothing is read."""
    try:
        return file.stat().st_size
    except OSError:
        return ABSENT


def some_images(root: Path, suffixes: Collection[str] | None = None) -> Found:
    """`find_images` of a folder that must have some.

    Args:
        suffixes: as in `find_images`.

    Raises:
        ValueError: as `find_images`, or there is no image at any depth.
    """
    found = find_images(root, suffixes=suffixes)
    if not found.names:
        raise ValueError(f"{printable(root)} holds no image. {what_is_there(found.tally)}")
    return found


def what_is_there(tally: Tally) -> str:
    """What was looked for, and what was found instead."""
    looked_for = f"Looked for files ending in {', '.join(sorted(readable_suffixes()))}, at any depth"
    return f"{looked_for}; " + (f"found {tally.others()}." if tally.left_out else "found no file at all.")


def total(tallies: Iterable[Tally]) -> Tally:
    """The sum over several folders."""
    both = Tally()
    for one in tallies:
        both.taken.update(one.taken)
        both.left_out.update(one.left_out)
    return both


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise ValueError(
            f"the folder {printable(folder)!r} cannot be listed: {error.strerror}. Make it readable or move it away; "
            "skipping it would silently change the data."
        ) from error


def _kind(entry: os.DirEntry[str]) -> str:
    """`file`, `folder` or `special`; asks the file system only where the listing does not say it."""
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
        entry.stat()
    except OSError:  # a link to nothing, or to itself
        return "file"
    return "special"


def _sorted(counts: Counter[str]) -> Sequence[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


# ---- a folder for each class -------------------------------------------------------------------------------------------


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


def class_folders(
    folder: Path, classes: Sequence[str] | None = None, suffixes: Collection[str] | None = None
) -> Labeled:
    """Images in a sub-folder for each class.

    Args:
        classes: those that there must be, in their order; all sub-folders by name if not given.
        suffixes: as in `find_images`.

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
        parts.append(some_images(folder / name, suffixes))
        photos += parts[-1].paths
        labels += [label] * len(parts[-1].names)
    log.info("%s: %s", folder, total(part.tally for part in parts))
    return Labeled(photos, labels, classes, tuple(absent))
