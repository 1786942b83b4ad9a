"""Any method in a size that trains in seconds on a CPU."""

from __future__ import annotations

import dataclasses

from clove_hub.methods import METHODS

SIZES = {
    "global_size": 64,
    "local_size": 32,
    "local_views": 2,
    "projector_hidden": 32,
    "feature_dim": 16,
    "attention_heads": 2,
    "hard_negatives": 3,
    "queue": 500,
    "prototypes": 8,
}
"""Settings that make a method small; each takes those that it has."""
RUN = {
    "backbone.model": "test_resnet",
    "batch.total": 8,
    "batch.per_device": 8,
    "batch.norm_group": 4,
    "data.workers": 0,
    "schedule.steps": 4,
    "schedule.warmup_epochs": 0,
    "run.precision": "fp32",
    "run.log_every": 1,
    "run.save_every": 2,
    "run.keep": 9,
}


def small(name: str, **changes: object) -> list[str]:
    """Overrides that make a run of the method small: `section__key=value` comes on top."""
    known = {field.name for field in dataclasses.fields(METHODS[name].settings)}
    settings: dict[str, object] = {f"method.{key}": value for key, value in SIZES.items() if key in known} | RUN
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in settings.items()]
