"""The bar of a run, and its speed."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


def redraw_interval() -> float:
    """Seconds: a terminal is redrawn ten times a second, a log file gets a line now and then."""
    return 0.1 if sys.stderr.isatty() else 10


class Progress:
    """The bar, on the main process alone. A context manager, within which log messages stand above the bar.

    Args:
        main: whether this is the main process.
        start: the step that the run starts or resumes at.
        steps: the last one.
    """

    def __init__(self, main: bool, start: int, steps: int) -> None:
        self.bar = tqdm(
            total=steps, initial=start, disable=not main, mininterval=redraw_interval(), unit="step", dynamic_ncols=True
        )
        self.redirect = logging_redirect_tqdm()
        self.idle = 0.0
        self.since, self.since_step = self.clock(), start

    def __enter__(self) -> Progress:
        self.redirect.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.redirect.__exit__(*error)
        self.bar.close()

    def clock(self) -> float:
        """Seconds, without those that belong to no step."""
        return time.perf_counter() - self.idle

    def lap(self, step: int) -> tuple[int, float]:
        """Steps and seconds since the last lap, which now ends after `step` steps."""
        now = self.clock()
        lap = step - self.since_step, now - self.since
        self.since, self.since_step = now, step
        return lap

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in the context belongs to no step: its time does not count."""
        began = time.perf_counter()
        yield
        self.idle += time.perf_counter() - began

    def show(self, figures: Mapping[str, str]) -> None:
        """Figures at the end of the bar."""
        self.bar.set_postfix(figures, refresh=False)
