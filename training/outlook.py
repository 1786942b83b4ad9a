"""The report of a run after its first twenty steps: its speed, its estimated end, and its memory."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

import torch

from .run.host import available_memory, peak_memory

SETTLED = 20
"""Steps after which the speed says something: those before compile code, fill queues and wait for the first images."""


class Memory(NamedTuple):
    """Peak memory of a process in gigabytes."""

    host: float
    device: float | None
    """Of an accelerator's memory; None on a CPU."""


def memory(device: torch.device) -> Memory:
    """Those of this process."""
    return Memory(peak_memory() / 1e9, torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None)


def outlook(steps: int, left: int, seconds: float, batch: int, waited: float, now: datetime) -> str:
    """The speed of a run's first steps, and the estimated time of the last.

    Args:
        steps: that took so many `seconds`; `left` are still to do.
        batch: images of a step.
        waited: fraction of the time in which the slowest process waited for data.
        now: at the end of these steps.
    """
    ahead = timedelta(seconds=left * seconds / steps)
    done = f"{in_words(ahead)} to go, until {now + ahead:%a %d %b %H:%M}" if left else "done"
    return f"{steps * batch / seconds:.3g} images/s, {done}; {waited:.0%} of the time waiting for data"


def in_words(time: timedelta) -> str:
    """`0.4 hours` are 24 minutes."""
    hours = time.total_seconds() / 3600
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes" if hours >= 1.5 / 60 else "a minute"


def memory_in_words(most: Memory, device: torch.device) -> str:
    """The largest memory of any process, and the available memory."""
    host = f"{most.host:.1f} GB of the host's memory, which has {available_memory() / 1e9:.1f} GB left"
    if most.device is None:
        return host
    return f"{most.device:.1f} of {torch.cuda.mem_get_info(device)[1] / 1e9:.1f} GB of the device's memory and {host}"
