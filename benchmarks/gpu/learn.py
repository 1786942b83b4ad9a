"""What has been learned after equal steps on the same photos: `correspond` on them, and `dense-probe` on images with masks.

First each method, and with `--reference` the released CLoVE code beside ours; then what the paper's ablations change of CLoVE,
seed by seed, for as long as there are minutes. Runs go beside each other, each in a process of its own, as one alone leaves a GPU
idle; steps are equal, not minutes. What a run has measured so far is there also where time ends before the run does.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from clove_hub.methods import METHODS

from .children import Children
from .journal import Journal
from .learn_released import a_released_run
from .learn_run import SIZES, a_run, rows, run_of
from .place import Place

STEPS = 200
PAIR = {
    "method.global_size": 128,
    "method.local_size": 64,
    "method.local_views": 6,
    "method.projector_hidden": 4096,
    "method.feature_dim": 256,
    "method.hard_negatives": 10,
    "method.attention": "standard",
    "backbone.model": "resnet50",
    "batch.total": 64,
    "batch.per_device": 64,
    "batch.norm_group": 64,
}
"""On top, where the released code runs beside: its heads are written for a ResNet-50, its loss for six small views."""
SMALL_PAIR = PAIR | {"method.local_size": 32, "batch.total": 2, "batch.per_device": 2, "batch.norm_group": 2}
ABLATIONS: dict[str, dict[str, object]] = {
    "as it is": {},
    "negatives of other images": {"method.negatives": "inter"},
    "negatives of other images, pooled": {"method.negatives": "inter_avg"},
    "plain attention": {"method.attention": "standard"},
    "without small views": {"method.local_views": 0},
    "regression loss": {"method.loss": "l2"},
    "regression loss without small views": {"method.loss": "l2", "method.local_views": 0},
    "T_pos 0.35": {"method.match_distance": 0.35},
    "T_pos 1.4": {"method.match_distance": 1.4},
}
"""What the paper's Tables 8 (loss and small views), 9 (attention), 10 (negatives) and 11 (T_pos) change; it has `as it is` ahead of all."""
REHEARSED = 2
"""Ablations of a rehearsal."""
SEEDS = 5
"""At most; minutes rather end it."""
ENDING = 8.0
"""Seconds at the end in which the rows are read."""


def run(journal: Journal, place: Place) -> None:
    steps = 4 if place.rehearse else STEPS
    photos = place.learned_from()
    named = ("clove", "byol") if place.rehearse else tuple(METHODS)
    first: dict[str, dict[str, Any]] = {f"learning by {name}": {"method": name} for name in named}
    if place.reference:
        pair = SMALL_PAIR if place.rehearse else PAIR
        first |= {"ours beside the released code": {"changes": pair}, "the released code": {"changes": pair}}
    with Children(place) as children:
        took = wave(journal, children, first, steps)
        for seed in range(1 if place.rehearse else SEEDS):
            if journal.left < took + ENDING:
                break
            varied = {name: changes | {"run.seed": seed} for name, changes in ABLATIONS.items()}
            names = list(varied)[: REHEARSED if place.rehearse else None]
            took = wave(journal, children, {f"{name}, seed {seed}": {"changes": varied[name]} for name in names}, steps)
    found = {"steps": steps, "photos": len(list(photos.rglob("*.jpg")))} | SIZES
    journal.note("settings", {"ok": True, "result": found})
    journal.note("differences to CLoVE as it is", {"ok": True, "result": differences(journal.items)})


def wave(journal: Journal, children: Children, runs: Mapping[str, dict[str, Any]], steps: int) -> float:
    """Runs beside each other, each of which is recorded; the seconds that they took together."""
    began, place = time.monotonic(), children.place
    workers = 0 if place.rehearse else max(len(os.sched_getaffinity(0)) // len(runs), 1)
    for name, given in runs.items():
        if name not in journal.items:
            function = a_released_run if name == "the released code" else a_run
            children.start(name, function, name=name, steps=steps, workers=workers, **given)
    for name in runs:
        left = max(journal.left - ENDING, 1.0)
        journal.item(name, partial(finished, children, name, left), limit=left + ENDING, least=0.0)
    return time.monotonic() - began


def differences(items: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Of each ablation's last figures to those of the same seed without it; a figure for each seed that has both."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in ABLATIONS:
        for seed in range(SEEDS):
            pair = [last(items.get(f"{one}, seed {seed}", {})) for one in (name, "as it is")]
            for figure in pair[0].keys() & pair[1].keys() if name != "as it is" else ():
                found.setdefault(name, {}).setdefault(figure, []).append(pair[0][figure] - pair[1][figure])
    return found


def last(item: Mapping[str, Any]) -> dict[str, float]:
    """The figures that a run ended with; none where it did not end."""
    result = item.get("result") or {}
    if not result.get("finished"):
        return {}
    shown = {"correspond": "correspond", "dense-probe": "mIoU"}
    by_step = {one: list(rows.values())[-1] for one, rows in result["evaluated"].items() if rows}
    return {protocol: metrics[shown[protocol]] for protocol, metrics in by_step.items()}


def finished(children: Children, name: str, seconds: float) -> dict[str, Any]:
    """What a run has returned, or so far written."""
    with contextlib.suppress(TimeoutError):
        found: dict[str, Any] = children.result(name, seconds)
        return found
    return {"finished": False, **rows(run_of(children.place, name))}
