"""What each method has learned after equal steps on the same photos: `correspond` on them, and `dense-probe` on images with masks.

The runs go beside each other, each in a process of its own, as one alone leaves a GPU idle; steps are equal, not minutes. What a run
has measured so far is there also where time ends before the run does.
"""

from __future__ import annotations

import contextlib
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import clove_hub
from clove_hub.methods import METHODS
from clove_hub.runs import read_rows
from clove_hub.settings import Given

from ..curves import RECIPE
from ..small import small
from .children import Children
from .journal import Journal
from .place import Place

STEPS = 200
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
ENDING = 8.0
"""Seconds at the end in which the rows are read."""


def run(journal: Journal, place: Place) -> None:
    steps = 4 if place.rehearse else STEPS
    names = ("clove", "byol") if place.rehearse else tuple(METHODS)
    workers = 0 if place.rehearse else max(len(os.sched_getaffinity(0)) // len(names), 1)
    photos = place.learned_from()
    with Children(place) as children:
        for name in names:
            children.start(f"learning by {name}", "a_method", method=name, steps=steps, workers=workers)
        for name in names:
            left = max(journal.left - ENDING, 1.0)
            what = partial(finished, children, name, place, left)
            journal.item(f"learning by {name}", what, limit=left + ENDING, least=0.0)
    journal.note(
        "settings", {"ok": True, "result": {"steps": steps, "photos": len(list(photos.rglob("*.jpg")))} | SIZES}
    )


def a_method(place: Place, method: str, steps: int, workers: int) -> dict[str, Any]:
    """Pre-trains by the method and evaluates on the way, as the recipe's `evaluate` has it."""
    tiny = dict(line.split("=", 1) for line in small(method))
    changes = tiny if place.rehearse else tiny | {key: str(value) for key, value in SIZES.items() if usable(key, tiny)}
    changes |= {"schedule.steps": str(steps), "run.save_every": str(steps), "data.workers": str(workers)}
    given: dict[str, Any] = {key: Given(value) for key, value in changes.items()}
    run = run_of(place, method)
    began = time.perf_counter()
    result = clove_hub.pretrain(
        RECIPE[method],
        **given,
        **{"data.path": str(place.learned_from()), "run.output": str(run)},
        evaluate=evaluations(place, steps),
    )
    return {"finished": result.finished, "steps": result.steps, "seconds": time.perf_counter() - began, **rows(run)}


def usable(key: str, tiny: dict[str, str]) -> bool:
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


def run_of(place: Place, method: str) -> Path:
    return place.work / "learned" / method


def finished(children: Children, name: str, place: Place, seconds: float) -> dict[str, Any]:
    """What a run has returned, or so far written."""
    with contextlib.suppress(TimeoutError):
        found: dict[str, Any] = children.result(f"learning by {name}", seconds)
        return found
    return {"finished": False, **rows(run_of(place, name))}


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
