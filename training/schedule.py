"""Everything that varies over pre-training, as pure functions of the step (counted from 0)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .recipe import Recipe


@dataclass(frozen=True)
class Schedule:
    """A recipe's schedule for a number of images."""

    epoch_steps: int
    """Optimizer steps in a pass over the images."""
    steps: int
    warmup: int
    """Steps in which the learning rate rises."""
    peak: float
    """The learning rate after them."""


def make_schedule(recipe: Recipe, epoch_steps: int) -> Schedule:
    """The schedule of a recipe with `epoch_steps` steps in a pass over the images.

    Raises:
        ValueError: the warm-up is longer than the run.
    """
    chosen = recipe.schedule
    steps = chosen.steps or round(chosen.epochs * epoch_steps)
    if chosen.warmup_epochs == "auto":
        warmup = min(5 * epoch_steps, steps // 10)
    else:
        warmup = round(chosen.warmup_epochs * epoch_steps)
    if warmup >= steps:
        raise ValueError(
            f"schedule.warmup_epochs={chosen.warmup_epochs} is {warmup} steps, but the run has only {steps}: "
            "lower it, give schedule.warmup_epochs=auto, or train longer"
        )
    return Schedule(epoch_steps, steps, warmup, recipe.optimizer.learning_rate * recipe.batch.total / 256)


def learning_rate(
    step: int,
    steps: int,
    warmup: int,
    peak: float,
    start_factor: float = 0.01,
    final_factor: float = 0.01,
    *,
    warmup_to_peak: bool = True,
    decay_every: int = 1,
) -> float:
    """Linear from start_factor * peak to peak over `warmup` steps, then half a cosine to final_factor * peak.

    Args:
        warmup_to_peak: whether the line's last step is at the peak, which then is held for two steps; or the next one.
        decay_every: steps between two points of the cosine, in which the rate stays.
    """
    if step < warmup:
        progress = step / max(warmup - warmup_to_peak, 1)
        return peak * (start_factor + (1 - start_factor) * progress)
    decayed = (step - warmup) // decay_every * decay_every
    return peak * half_cosine(decayed, steps - warmup, 1.0, final_factor)


def weight_decay(step: int, steps: int, recipe: Recipe) -> float | None:
    """From optimizer.weight_decay to schedule.final_weight_decay along half a cosine; None where it does not vary."""
    final = recipe.schedule.final_weight_decay
    return None if final is None else half_cosine(step, steps, recipe.optimizer.weight_decay, final)


def half_cosine(step: int, steps: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 toward `end`, which step `steps` would reach."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))
