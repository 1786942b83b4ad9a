"""Everything that varies over fine-tuning, as pure functions of the step (counted from 0)."""

from __future__ import annotations

from dataclasses import dataclass

from .settings import PROTOCOL_BATCH, PROTOCOL_STEPS, PROTOCOL_WARMUP, Settings


@dataclass(frozen=True)
class Plan:
    steps: int
    warmup: int
    peak: float
    """The learning rate between warm-up and the first decay."""
    decays: tuple[int, ...]
    """Steps at which the learning rate is divided by ten."""
    scaled: str | None
    """How it differs from the protocol because the batch does, in a sentence."""


def plan(settings: Settings, images: int) -> Plan:
    """The schedule for `images` training images; where the batch is not the protocol's, scaled linearly with it.

    Goyal et al. 2017: k times the images in a step, k times the learning rate, 1/k of the steps.

    Raises:
        ValueError: the warm-up is longer than the run.
    """
    batch, schedule = settings.batch.total, settings.schedule
    protocol_steps, factor = PROTOCOL_STEPS[settings.task], batch / PROTOCOL_BATCH
    if schedule.epochs is not None:
        steps = max(round(schedule.epochs * images / batch), 1)
    else:
        steps = schedule.steps or round(protocol_steps / factor)
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = min(round(PROTOCOL_WARMUP / factor), steps // 10)
    if warmup >= steps:
        raise ValueError(
            f"schedule.warmup_steps={warmup}, but the run has only {steps} steps: lower it or train longer"
        )
    peak = settings.optimizer.learning_rate * factor
    changes = [f"learning rate {settings.optimizer.learning_rate:g} -> {peak:g}"]
    if schedule.steps is None and schedule.epochs is None:
        changes.append(f"{protocol_steps} -> {steps} steps")
        if schedule.warmup_steps is None:
            changes.append(f"warm-up {PROTOCOL_WARMUP} -> {warmup} steps")
    scaled = f"batch.total={batch} is not the protocol's {PROTOCOL_BATCH}, so scaled with it: {', '.join(changes)}"
    decays = tuple(round(share * steps) for share in schedule.decay_at)
    return Plan(steps, warmup, peak, decays, None if batch == PROTOCOL_BATCH else scaled)


def learning_rate(step: int, plan: Plan) -> float:
    """A straight line from a thousandth of the peak over the warm-up, then a tenth after each decay."""
    rate = plan.peak * 0.1 ** sum(step >= decay for decay in plan.decays)
    if step < plan.warmup:
        share = step / plan.warmup
        return rate * (0.001 * (1 - share) + share)
    return rate
