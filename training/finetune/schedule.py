"""Everything that varies during fine-tuning, as pure functions of the step (counted from 0)."""

from __future__ import annotations

from dataclasses import dataclass

from .settings import PRESETS, FinetuneSettings

LEAST_WARMUP = 100
"""Minimum warm-up steps of a preset with a warm-up, unless the run is shorter than twice as many."""


@dataclass(frozen=True)
class Plan:
    steps: int
    warmup: int
    peak: float
    """The learning rate between warm-up and decay."""
    decays: tuple[int, ...]
    """Steps at which the learning rate is divided by ten."""
    power: float
    """Exponent of the learning rate's polynomial (1 - step / steps) ** power; 0 if it has none."""
    scaled: str | None
    """How the batch changes the preset's schedule, in a sentence."""
    epoch: int | None = None
    """Steps of a whole epoch, within which the learning rate is constant; None if it changes with each step."""
    evaluate: int | None = None
    """Steps between two evaluations, of which the best is kept; None if only the last step is evaluated."""


def plan(settings: FinetuneSettings, images: int) -> Plan:
    """The schedule for `images` training images; scaled linearly if the batch is not the preset's.

    Goyal et al. 2017: k times the images in a step, k times the learning rate (of SGD), 1/k of the steps.

    Raises:
        ValueError: the warm-up is longer than the run, or there is no whole epoch.
    """
    protocol, schedule = PRESETS[settings.preset], settings.schedule
    batch, usual = settings.batch.total, protocol.schedule
    factor = batch / protocol.batch.total
    epoch = images // batch if schedule.by_epoch else None
    if epoch == 0:
        raise ValueError(
            f"{images} training images do not fill a batch of {batch}, and schedule.by_epoch=true leaves out what does not "
            f"fill one: choose batch.total={images} or less, or schedule.by_epoch=false"
        )
    changes = []
    if schedule.steps is not None:
        steps = schedule.steps
    elif epochs := schedule.epochs or usual.epochs:
        steps = max(round(epochs * (epoch or images / batch)), 1)
    else:
        assert usual.steps is not None
        steps = round(usual.steps / factor)
        changes.append(f"{usual.steps} -> {steps} steps")
    warmup = schedule.warmup_steps
    if warmup is None:
        assert usual.warmup_steps is not None
        # Short runs also need some steps: after 20 a detector with 16 images at twice the usual rate diverged.
        warmup = min(round(usual.warmup_steps / factor), max(steps // 10, min(LEAST_WARMUP, steps // 2)))
        if changes and warmup:
            changes.append(f"warm-up {usual.warmup_steps} -> {warmup} steps")
    if warmup >= steps:
        raise ValueError(
            f"schedule.warmup_steps={warmup}, but the run has only {steps} steps: lower it or train longer"
        )
    peak = settings.optimizer.learning_rate
    if settings.optimizer.name == "sgd":
        peak *= factor
        changes.insert(0, f"learning rate {settings.optimizer.learning_rate:g} -> {peak:g}")
    scaled = None
    if factor != 1 and changes:
        scaled = (
            f"batch.total={batch} is not the protocol's {protocol.batch.total}, so scaled with it: {', '.join(changes)}"
        )
    polynomial = schedule.decay == "polynomial"
    decays = () if polynomial else tuple(round(share * steps) for share in schedule.decay_at)
    power = schedule.power if polynomial else 0.0
    return Plan(steps, warmup, peak, decays, power, scaled, epoch, epoch or settings.run.evaluate_every)


def learning_rate(step: int, plan: Plan) -> float:
    """A linear warm-up from a thousandth of the peak, then a tenth after each decay, or a polynomial."""
    at = step - step % plan.epoch if plan.epoch else step
    rate: float = plan.peak * 0.1 ** sum(at >= decay for decay in plan.decays) * (1 - at / plan.steps) ** plan.power
    if step < plan.warmup:
        share = step / plan.warmup
        return rate * (0.001 * (1 - share) + share)
    return rate
