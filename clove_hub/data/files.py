"""Lists of files, parts of them, and the fingerprint of the files that a figure was measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from clove_hub.documents import reason

from .finder import size_of, some_images
from .images import SUFFIXES

_HASHED = 16
_Name = TypeVar("_Name", int, str)
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Data:
    """What was evaluated on."""

    name: str
    fingerprint: str
    """64 hexadecimal digits that change with the files, wherever they are stored."""
    samples: int
    """What the metrics are an average over: images, or clips of a video."""


def lines(path: Path) -> list[str]:
    """The lines of a list of names that are not empty.

    Raises:
        ValueError: it cannot be read, or is empty.
    """
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"the list {path} cannot be read: {reason(error)}") from error
    if not found:
        raise ValueError(f"the list {path} is empty")
    return found


def pictures_by_name(folder: Path) -> dict[str, Path]:
    """The images in a folder and its folders by their paths in it without the ending; of two endings JPEG is taken.

    Raises:
        ValueError: there is no such folder, or no image in it.
    """
    endings = {suffix: place for place, suffix in enumerate(SUFFIXES)}
    found = sorted(
        some_images(folder).paths, key=lambda path: endings.get(path.suffix.lower(), len(endings)), reverse=True
    )
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}


def add_files(digest: Any, root: Path, files: Iterable[Path]) -> None:
    """Adds the files' names below the root, and their sizes, to a hash: one look at each, and nothing is read."""
    for path in files:
        digest.update(f"{path.relative_to(root).as_posix()}\0{size_of(path)}\n".encode("utf-8", "surrogateescape"))


def described(root: Path, files: Sequence[Path], samples: int) -> Data:
    """Name and fingerprint of the files used: their names below the root, their sizes, the bytes of sixteen of them."""
    digest = hashlib.sha256(str(len(files)).encode())
    add_files(digest, root, files)
    for index in np.linspace(0, len(files) - 1, min(len(files), _HASHED)).astype(int):
        digest.update(hashlib.sha256(files[index].read_bytes()).digest())
    return Data(root.resolve().name, digest.hexdigest(), samples)


def spread(items: Sequence[_Item], limit: int | None) -> list[_Item]:
    """At most `limit` of the items, spread evenly over the list; all if None."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[number] for number in np.linspace(0, len(items) - 1, limit).round().astype(int).tolist()]


def chosen(names: Sequence[_Name], fraction: float, seed: int) -> list[_Name]:
    """The images of a low-data setting, sorted: a list that depends on (names, fraction, seed) and nothing else.

    All names, sorted, are put into the order of as many uniform numbers of `stream(seed, 0, 1, Purpose.ORDER)`, and
    the first round(fraction * count) are taken, at least one. So the list of a smaller share lies within that of a
    larger one.
    """
    from clove_hub.views import Purpose, stream  # imports torch

    ordered = sorted(names)
    count = max(round(fraction * len(ordered)), 1)
    places = stream(seed, 0, 1, Purpose.ORDER).random(len(ordered)).argsort(kind="stable")[:count]
    return sorted(ordered[place] for place in places.tolist())
