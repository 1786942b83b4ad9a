"""How long a test waits for what should happen: long enough for any machine, however busy."""

import time
from collections.abc import Callable

PATIENCE = 1800
"""Seconds; at least ten times what anything here takes on a quiet machine with two cores."""


def until(met: Callable[[], bool]) -> None:
    """Returns when something has happened."""
    end = time.monotonic() + PATIENCE
    while not met():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.05)
