"""Everything that varies over a run, as pure functions of the step (counted from 0)."""

from __future__ import annotations

import math


def learning_rate(
    step: int, steps: int, warmup: int, peak: float, start_factor: float = 0.01, final_factor: float = 0.01
) -> float:
    """A straight line from start_factor * peak to peak over `warmup` steps, then half a cosine to final_factor * peak.

    Both ends of the line are reached, so the peak is held for two steps, as in the released code.
    """
    if step < warmup:
        progress = step / (warmup - 1) if warmup > 1 else 0.0
        return peak * (start_factor + (1 - start_factor) * progress)
    return peak * cosine(step - warmup, steps - warmup, 1.0, final_factor)


def teacher_momentum(step: int, steps: int, start: float, final: float = 1.0) -> float:
    """Half a cosine from `start` to `final`."""
    return cosine(step, steps, start, final)


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 toward `end`, which step `steps` would reach."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))
