"""Images that cannot be read: left out of an evaluation or a figure, counted and named, up to a limit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from clove_hub.data.images import BrokenImage, printable

from .processes import world

log = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")

_NAMED = 20


def unless_broken(load: Callable[[T], U]) -> Callable[[T], U | BrokenImage]:
    """`load`, but a broken image is what it returns, not what it raises."""

    def attempt(item: T) -> U | BrokenImage:
        try:
            return load(item)
        except BrokenImage as error:
            return error

    return attempt


def readable(loaded: Sequence[T | BrokenImage]) -> tuple[list[T], list[BrokenImage | None]]:
    """What could be loaded, and for each item why it could not."""
    good = [one for one in loaded if not isinstance(one, BrokenImage)]
    return good, [one if isinstance(one, BrokenImage) else None for one in loaded]


def settle(
    problems: Sequence[BrokenImage | None], data: Path | None = None, what: str = "images"
) -> tuple[tuple[str, str], ...]:
    """Name and reason of each image that could not be read, with a warning for each of the first ones.

    A tenth of the images may be broken; of a small set up to ten, but never more than half.

    Args:
        problems: for each image why it could not be read, or None. The same in every process.
        data: the folder that names are told relative to.
        what: is left out: the images, or the clips of which they are frames.

    Raises:
        ValueError: there are more, so that what is left is another set of images.
    """
    above = "" if data is None else f"{printable(data)}/"
    left_out = tuple((one.name.removeprefix(above), one.reason) for one in problems if one is not None)
    count = len(problems)
    if len(left_out) > max(count // 10, min(10, count // 2)):
        first = "; ".join(f"{name}: {reason}" for name, reason in left_out[:3])
        where = "" if data is None else f" in {printable(data)}"
        raise ValueError(
            f"{len(left_out)} of {count} {what}{where} cannot be read, too many to leave out: {first}"
            f"{'; ...' if len(left_out) > 3 else ''}. `clove-hub check` with the folder lists all"
        )
    if left_out and world()[0] == 0:
        log.warning("%d of %d %s cannot be read and are left out:", len(left_out), count, what)
        for name, reason in left_out[:_NAMED]:
            log.warning("left out %s: %s", name, reason)
        if len(left_out) > _NAMED:
            log.warning("... and %d more, which the result names", len(left_out) - _NAMED)
    return left_out
