"""Another number of images in an iteration than the protocol's: learning rate and schedule follow it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BATCH = "SOLVER.IMS_PER_BATCH"
RATE = "SOLVER.BASE_LR"
ITERATIONS = (
    "SOLVER.MAX_ITER",
    "SOLVER.STEPS",
    "SOLVER.WARMUP_ITERS",
    "TEST.EVAL_PERIOD",
)


def scaled(protocol: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """What must change when `batch` images make an iteration, so that as many images are seen in all.

    Goyal et al. 2017: k times the images in an iteration, k times the learning rate, 1/k of the iterations.

    Args:
        protocol: BATCH, RATE and ITERATIONS as the protocol has them.

    Returns:
        The changed values by their keys; empty for the protocol's own batch.
    """
    factor = batch / protocol[BATCH]
    if factor == 1:
        return {}
    changes: dict[str, Any] = {RATE: protocol[RATE] * factor}
    for key in ITERATIONS:
        value = protocol[key]
        if isinstance(value, int):
            changes[key] = max(round(value / factor), 1) if value else 0  # a period of 0 means never
        else:
            changes[key] = tuple(max(round(step / factor), 1) for step in value)
    return {key: value for key, value in changes.items() if value != protocol[key]}


def said(protocol: Mapping[str, Any], batch: int, changes: Mapping[str, Any]) -> str:
    """The changes in a sentence."""
    listed = ", ".join(f"{key} {_plain(protocol[key])} -> {_plain(value)}" for key, value in changes.items())
    return f"{batch} images in an iteration, the protocol's are {protocol[BATCH]}: {listed or 'nothing else changes'}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
