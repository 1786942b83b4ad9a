"""One run of `learn`: its sizes, where it lies, how it is evaluated on the way, and what it has written so far."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import clove_hub
from clove_hub.runs import read_rows
from clove_hub.settings import Given

from ..curves import RECIPE
from ..small import small
from .place import Place

SIZES = {
    "method.global_size": 128,
    "method.local_size": 64,
    "method.local_views": 4,
    "method.projector_hidden": 1024,
    "method.feature_dim": 128,
    "method.attention_heads": 8,
    "method.hard_negatives": 5,
    "method.queue": 4096,
    "method.prototypes": 64,
    "backbone.model": "resnet18",
    "batch.total": 128,
    "batch.per_device": 128,
    "batch.norm_group": 64,
    "run.precision": "bf16",
    "run.log_every": 20,
    "data.cache": "true",
}
"""Of a run on a GPU; those settings that a method does not have fall away."""


def a_run(
    place: Place,
    name: str,
    steps: int,
    workers: int,
    method: str = "clove",
    changes: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Pre-trains by the method and evaluates on the way, as the recipe's `evaluate` has it."""
    given: dict[str, Any] = {
        key: Given(str(value)) for key, value in sizes(place, method, steps, workers, changes).items()
    }
    run = run_of(place, name)
    began = time.perf_counter()
    result = clove_hub.pretrain(
        RECIPE[method],
        **given,
        **{"data.path": str(place.learned_from()), "run.output": str(run)},
        evaluate=evaluations(place, steps),
    )
    return {"finished": result.finished, "steps": result.steps, "seconds": time.perf_counter() - began, **rows(run)}


def sizes(
    place: Place, method: str, steps: int, workers: int, changes: Mapping[str, object] | None
) -> dict[str, object]:
    """What a run changes of the method's recipe."""
    tiny: dict[str, object] = {key: value for key, _, value in (line.partition("=") for line in small(method))}
    found = tiny if place.rehearse else tiny | {key: value for key, value in SIZES.items() if usable(key, tiny)}
    last = {"schedule.steps": steps, "run.save_every": steps, "data.workers": workers}
    return found | dict(changes or {}) | last


def usable(key: str, tiny: Mapping[str, object]) -> bool:
    return key in tiny or not key.startswith("method.")


def evaluations(place: Place, steps: int) -> list[dict[str, Any]]:
    size = 64 if place.rehearse else 160
    settings: dict[str, Any] = {"images": 8 if place.rehearse else 200, "size": size}
    photos = str(place.learned_from())
    found = [{"protocol": "correspond", "data": photos, "every": max(steps // 2, 1), "settings": settings}]
    if place.segmentation:
        probe: dict[str, Any] = {"height": 180, "width": 240, "seeds": 1, "epochs": 2 if place.rehearse else 10}
        probe |= {"train_images": 4, "test_images": 2} if place.rehearse else {"train_images": 120, "test_images": 80}
        found.append({"protocol": "dense-probe", "data": str(place.segmentation), "every": steps, "settings": probe})
    return found


def run_of(place: Place, name: str) -> Path:
    return place.work / "learned" / name.removeprefix("learning by ").replace(" ", "_").replace(",", "")


def rows(run: Path) -> dict[str, Any]:
    """The evaluations of a run and the rows that it has logged, by step."""
    evaluated: dict[str, dict[int, Any]] = {}
    for row in read_rows(run / "evaluations.jsonl"):
        evaluated.setdefault(row["record"]["protocol"], {})[row["step"]] = row["record"]["metrics"]
    logged = read_rows(run / "metrics.jsonl")
    rates = [row["images_per_second"] for row in logged if "images_per_second" in row]
    return {
        "evaluated": evaluated,
        "losses": {row["step"]: row["loss"] for row in logged},
        "spread": logged[-1].get("embedding_spread") if logged else None,
        "images_per_second": rates[-1] if rates else None,
    }
