"""A progress bar with the remaining time: enabled by commands, disabled in Python calls."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tqdm.auto import tqdm

from .processes import world

T = TypeVar("T")
_shown: ContextVar[bool] = ContextVar("shown", default=False)
_PATIENCE = 3
"""Seconds: what is done by then needs no bar."""


@contextmanager
def progress_shown() -> Iterator[None]:
    """What is `tracked` within has a bar, on the first process."""
    before = _shown.set(True)
    try:
        yield
    finally:
        _shown.reset(before)


def tracked(units: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The units, one after the other, with a bar if enabled and if they take longer than a few seconds.

    Args:
        what: is done, before the bar.
        total: how many units there are, where they have no length.
    """
    if not _shown.get() or world()[0]:
        yield from units
        return
    redraw = 0.1 if sys.stderr.isatty() else 30  # seconds: a log file gets a line now and then
    yield from tqdm(units, what, total, leave=False, delay=_PATIENCE, mininterval=redraw, dynamic_ncols=True)
