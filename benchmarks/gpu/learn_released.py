"""The released CLoVE code for as many steps as ours, on the same photos and views.

The views come from our loader and device stage: the released transform makes small views of 96 pixels alone, and would take all of
the minutes. Network, loss, optimizer and the teacher's average are the released ones; rates are the recipe's. A checkpoint is written
as the released code writes one, and evaluated as any other file.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import clove_hub
from clove_hub.methods.clove import view_spec
from clove_hub.training.data import steps_per_epoch
from clove_hub.training.recipe import Recipe, load
from clove_hub.training.schedule import half_cosine, learning_rate, make_schedule
from clove_hub.training.step import on_device
from clove_hub.views import DeviceViews

from ..curves import RECIPE
from ..pipeline import our_batches
from ..released import ReleasedStep, open_released
from ..setting import photos
from ..step import as_released
from .learn_run import evaluations, run_of, sizes
from .place import Place


def a_released_run(place: Place, name: str, steps: int, workers: int, changes: Mapping[str, object]) -> dict[str, Any]:
    """Trains from random weights and evaluates on the way; the same entries as those of a run of ours."""
    run = run_of(place, name)
    run.mkdir(parents=True)
    given = sizes(place, "clove", steps, workers, changes) | {"data.path": place.learned_from(), "run.output": run}
    recipe = load(RECIPE["clove"], [f"{key}={value}" for key, value in given.items()])
    spec, (source, _) = view_spec(recipe.method), photos(recipe)
    released = open_released(place.reference, spec, own_transform=False)
    assert released is not None
    step, make_views = ReleasedStep(released, recipe, place.device), DeviceViews(spec).to(place.device)
    rates = scheduled(recipe, steps_per_epoch(source, recipe.batch.total))
    batches = on_device(our_batches(source, spec, recipe, place.device, steps), place.device)
    evaluated: dict[str, dict[int, Any]] = {}
    losses: dict[int, float] = {}
    began = time.perf_counter()
    for done in range(steps + 1):
        for entry in evaluations(place, steps):
            if done % entry["every"] == 0:
                path = written(step, run, done)
                found = clove_hub.evaluate(
                    entry["protocol"], path, entry["data"], device=place.device.type, **entry["settings"]
                )
                evaluated.setdefault(entry["protocol"], {})[done] = dict(found.metrics)
        if done < steps:
            pictures, boxes = as_released(make_views(next(batches).crops))
            losses[done + 1] = step(pictures, boxes, *rates[done])
    seconds = time.perf_counter() - began
    kept = {number: loss for number, loss in losses.items() if number == 1 or number % recipe.run.log_every == 0}
    return {"finished": True, "steps": steps, "seconds": seconds, "evaluated": evaluated, "losses": kept}


def scheduled(recipe: Recipe, epoch_steps: int) -> list[tuple[float, float]]:
    """Learning rate and teacher's momentum of each step, as our loop has them."""
    schedule, chosen = make_schedule(recipe, epoch_steps), recipe.schedule
    return [
        (
            learning_rate(
                *(step, schedule.steps, schedule.warmup, schedule.peak),
                *(chosen.start_factor, chosen.final_factor),
                warmup_to_peak=chosen.warmup_to_peak,
            ),
            half_cosine(step, schedule.steps, chosen.teacher_momentum, chosen.final_teacher_momentum),
        )
        for step in range(schedule.steps)
    ]


def written(step: ReleasedStep, run: Path, done: int) -> Path:
    """A checkpoint with the entries and names of the released code's."""
    path = run / f"ckpt_{done}.pth"
    if not path.is_file():
        tensors = {f"module.{name}": tensor for name, tensor in step.model.state_dict().items()}
        state = {"model": tensors, "optimizer": {}, "scaler": {}, "epoch": done, "opt": Namespace(arch="resnet50")}
        torch.save(state, path)
    return path
