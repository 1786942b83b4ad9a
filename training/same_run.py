"""Whether two recipes are the same run: settings that may differ, that may be amended, and that older runs lack."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from clove_hub import settings as typed

from .settings import OptimizerSettings, ScheduleSettings

# Settings that may change when a run resumes: they change how it is carried out, not what it computes.
FREE = {
    "data.path",
    "data.workers",
    "data.cache",
    "batch.per_device",
    "backbone.grad_checkpointing",
    "run.output",
    "run.compile",
    "run.profile",
    "run.log_every",
    "run.save_every",
    "run.keep",
    "run.amend",
    "run.timeout",
    "run.trackers",
    "evaluate",
}
# Settings that `run.amend` may change after the first step.
AMENDABLE = {
    *(f"optimizer.{field.name}" for field in fields(OptimizerSettings) if field.name != "name"),
    *(f"schedule.{field.name}" for field in fields(ScheduleSettings)),
    "batch.norm_group",
    "data.skip",
    "run.precision",
}
# What runs computed before the setting existed; their recipes do not have it.
UNSAID = {
    "backbone.freeze": 0,
    "backbone.freeze_norm": False,
    "backbone.level": -1,
    "backbone.pretrained": None,
    "backbone.zero_init_last": True,
    "data.bands": 3,
    "method.interpolation": "bicubic",
    "method.knn_order": "look_first",
    "optimizer.backbone_rate": 1.0,
    "optimizer.betas": None,
    "optimizer.clip_norm": None,
    "optimizer.eps": 1e-8,
    "optimizer.layer_decay": 1.0,
    "schedule.warmup_to_peak": True,
    "schedule.decay": "step",
    "schedule.final_weight_decay": None,
}
# Settings that may differ between the processes of a run, which may be on several hosts.
OF_A_HOST = {"data.path"}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """The differences that make two recipes different runs: `section.key: old -> new`.

    Args:
        free: further settings that may differ.
    """
    known = typed.flat(new)
    unsaid = {key: value for key, value in UNSAID.items() if key in known}
    return typed.differences(unsaid | typed.flat(old), new, FREE.union(free))
