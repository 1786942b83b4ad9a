"""How things are timed: several ways of doing one thing by turns in one process, compared turn by turn.

What disturbs a machine disturbs neighboring turns alike, so that ratios hold where seconds do not.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Sample = Callable[[], float]
"""Does the work once or several times; returns the seconds of once."""

Spread = dict[str, float]
"""Median, extremes and quartiles of some numbers, and how many they are."""

LONG_ENOUGH = 0.2
"""Seconds that a sample should last, so that the clock and the device's queue do not count."""


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(action: Callable[[], object], device: torch.device, before: Callable[[], object] | None = None) -> Sample:
    """A sample of `action`, repeated until it lasts `LONG_ENOUGH`; `before` is done before each and not counted."""
    calls = 0

    def run(count: int) -> float:
        seconds = 0.0
        for _ in range(count if before else 1):
            if before:
                before()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(1 if before else count):
                action()
            synchronize(device)
            seconds += time.perf_counter() - start
        return seconds / count

    def sample() -> float:
        nonlocal calls
        if not calls:
            run(1)  # the first call of all prepares kernels and memory
            calls = min(max(math.ceil(LONG_ENOUGH / run(1)), 1), 100)
        return run(calls)

    return sample


def by_turns(samples: Mapping[str, Sample], rounds: int) -> dict[str, list[float]]:
    """A B A B ...: the seconds of `rounds` samples of each, after one of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in samples}
    for turn in range(rounds + 1):
        for name, sample in samples.items():
            one = sample()
            if turn:
                seconds[name].append(one)
    return seconds


def spread(values: Sequence[float]) -> Spread:
    quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "median": quarters[1],
        "min": min(values),
        "q1": quarters[0],
        "q3": quarters[2],
        "max": max(values),
        "rounds": len(values),
    }


def times_faster(ours: Sequence[float], others: Sequence[float]) -> Spread:
    """The others' seconds over ours, turn by turn."""
    return spread([other / own for own, other in zip(ours, others, strict=True)])
