"""A part of a list of images: spread evenly, or the list of a low-data setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from clove_hub.views import Purpose, stream

_Name = TypeVar("_Name", int, str)
_Item = TypeVar("_Item")


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
    ordered = sorted(names)
    count = max(round(fraction * len(ordered)), 1)
    places = stream(seed, 0, 1, Purpose.ORDER).random(len(ordered)).argsort(kind="stable")[:count]
    return sorted(ordered[place] for place in places.tolist())
