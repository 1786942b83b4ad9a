"""How fast is a step, what takes its time, what could the hardware do at most? The pieces are those of the other benchmarks.

CLoVE around a ResNet-50 on 2x224 + 6x96 in bf16 and channels_last unless an item says otherwise; the crops are made up, the photos
of the loader 500x375 JPEGs.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from clove_hub.methods import METHODS
from clove_hub.training.pretrain import own_accelerator
from clove_hub.training.recipe import Recipe
from clove_hub.training.step import TrainState
from clove_hub.views import CropBatch

from ..curves import RECIPE
from ..end_to_end import ours, paced
from ..measure import Sample, by_turns, spread, synchronize, timed
from ..pipeline import loaded, our_batches
from ..released import ReleasedStep, open_released, released_dataset, released_loader
from ..report import hardware, versions
from ..setting import made_crops, make_accelerator, photos, sized
from ..small import small
from ..step import as_released, loss_sides, predictor, tuned, update_sides
from ..train_state import (
    MOMENTUM,
    RATE,
    bare_backbones,
    flops_per_image,
    make_train_state,
    matmul_peak,
    peak_memory,
    several,
    shares,
    step,
)
from .journal import Journal
from .place import Place, options

SIZES = (256, 192, 128)
ROUNDS, STEPS = 3, 3


def run(journal: Journal, place: Place) -> None:
    rounds, steps = (1, 1) if place.rehearse else (ROUNDS, STEPS)
    device = place.device
    half = "bf16" if place.on_gpu else "fp32"

    @cache
    def of(size: int) -> tuple[Recipe, TrainState, CropBatch]:
        return setup(place, size)

    def fitting() -> int:
        """The largest of the sizes whose step fits."""
        for size in (8,) if place.rehearse else SIZES:
            train_state = crops = None  # which an error must not keep
            try:
                _, train_state, crops = of(size)
                for _ in range(2):
                    step(train_state, crops)
                return size
            except torch.OutOfMemoryError as error:
                print(f"a step of {size} does not fit: {str(error)[:200]}", flush=True)
            of.cache_clear()
            train_state = crops = None
            collect(device)
        raise ValueError("no step fits")

    def usual() -> tuple[Recipe, TrainState, CropBatch]:
        return of(batch)

    def action() -> Callable[[], None]:
        _, train_state, crops = usual()
        return partial(step, train_state, crops)

    def alone(work: Callable[[], object]) -> dict[str, float]:
        return milliseconds(by_turns({"it": timed(work, device)}, rounds)["it"])

    # ---- the step and its roof -----------------------------------------------------------------------------------
    journal.item("on what", lambda: {**hardware(device), **versions(), "nvidia-smi": nvidia_smi(place)})
    journal.item("TFLOP/s of a matrix product", lambda: matmul_peak(device, half, rounds))
    batch = journal.item("the batch", fitting) or SIZES[-1]
    journal.item(f"a step of {batch}", lambda: rate(place, action(), batch, rounds, steps))
    journal.item("GFLOP of an image", lambda: flops_per_image(usual()[1], two(usual()[1], place)) / 1e9)
    journal.item("the bare backbones", lambda: rate(place, bare(usual), batch, rounds, steps))
    journal.item("shares of a step's ranges", lambda: shares(action(), device, steps))

    # ---- from photos ---------------------------------------------------------------------------------------------
    most = 1 if place.rehearse else max(len(os.sched_getaffinity(0)) - 1, 1)
    journal.item("photos are made", lambda: photos(sized(options(place)))[1])
    for workers in sorted({most, max(most // 2, 1)}, reverse=True):
        journal.item(
            f"the loader alone, {workers} workers",
            lambda w=workers: loader(place, batch, w, rounds),  # type: ignore[misc]
        )
    journal.item(f"from photos, {most} workers", lambda: from_photos(usual, place, batch, most, steps), limit=60)

    # ---- beside the released code --------------------------------------------------------------------------------
    if place.reference:
        for size in (batch, batch // 2):  # theirs may need more memory
            name = f"a step of {size} beside the released one"
            if journal.item(name, partial(beside_released, partial(of, size), place, rounds, steps), limit=120):
                break

    # ---- the parts alone -----------------------------------------------------------------------------------------
    journal.item("the views' device stage alone", lambda: alone(partial(usual()[1].make_views, usual()[2])))
    journal.item(
        "the loss alone, there and back",
        lambda: alone(loss_sides(usual()[1], None, usual()[0], batch)[0]["ours"]),
    )
    journal.item("the predictor alone, there and back", lambda: alone(predictor(usual()[1], batch)))
    journal.item(
        "LARS and the teacher's average",
        lambda: milliseconds(by_turns(update_sides(usual()[1], None), rounds)["ours"]),
    )
    journal.item("profile of a step", lambda: profile(action(), place, journal))
    of.cache_clear()
    collect(device)

    # ---- other sizes and settings --------------------------------------------------------------------------------
    def other(name: str, size: int, *changes: str, recipe: str | None = None, limit: float = 60) -> None:
        def work() -> dict[str, Any]:
            collect(device)
            with own_accelerator():
                _, train_state, crops = setup(place, size, *changes, recipe=recipe)
                found = rate(place, partial(step, train_state, crops), size, 1, steps)
                assert bool(train_state.finite), "a step that is not finite is not a step"
            return found

        journal.item(name, work, limit)

    sizes = (4,) if place.rehearse else (64, 128, 512)
    for size in sizes:
        other(f"a step of {size}", size)
    compiled = 4 if place.rehearse else 128
    if place.on_gpu:
        other(f"a compiled step of {compiled}", compiled, "run.compile=true", limit=100)
    other(f"a step of {compiled} without channels_last", compiled, "run.channels_last=false")
    for one in ("fp16", "fp32") if place.on_gpu else ():
        other(f"a step of {compiled} in {one}", compiled, f"run.precision={one}")
    for name in METHODS:
        other(f"a step of {name}, {compiled} images", compiled, recipe=name)
    if place.on_gpu:
        tried = "a step with cudnn.benchmark=true"
        journal.item(tried, lambda: rate(place, partial(tuned, action()), batch, rounds, steps), limit=90)
        of.cache_clear()
        collect(device)
        other(f"a compiled step of {batch}", batch, "run.compile=true", limit=150)


# ---- what is measured ------------------------------------------------------------------------------------------------


def setup(place: Place, batch: int, *changes: str, recipe: str | None = None) -> tuple[Recipe, TrainState, CropBatch]:
    """The recipe, or a method's own at CLoVE's batch, with its crops on the device."""
    chosen = options(place, [f"batch.total={batch}", *changes])
    if recipe and place.rehearse:
        chosen.overrides = [*small(recipe), *chosen.overrides[-1 - len(changes) :]]
    made = sized(chosen, recipe=RECIPE[recipe]) if recipe else sized(chosen)
    train_state = make_train_state(made, make_accelerator(made, place.device.type))
    return made, train_state, made_crops(train_state.method.view_spec, batch).to(place.device)


def rate(place: Place, action: Callable[[], object], batch: int, rounds: int, steps: int) -> dict[str, Any]:
    """Images/s; how long the host takes to ask for a step; and the gigabytes that a step takes on top of what stays."""
    device = place.device
    action()  # which makes what stays: gradients, momenta, workspaces
    memory = peak_memory(action, device)
    held = torch.cuda.memory_allocated(device) / 1e9 if place.on_gpu else None
    seconds = by_turns({"it": several(action, device, steps)}, rounds)["it"]
    synchronize(device)
    began = time.perf_counter()
    action()
    host = time.perf_counter() - began
    synchronize(device)
    return {
        "images_per_second": batch / statistics.median(seconds),
        "ms": milliseconds(seconds),
        "host_ms": 1000 * host,
        "peak_gb": memory,
        "held_gb": held,
    }


def milliseconds(seconds: list[float]) -> dict[str, float]:
    return spread([1000 * one for one in seconds])


def bare(usual: Callable[[], tuple[Recipe, TrainState, CropBatch]]) -> Callable[[], None]:
    _, train_state, crops = usual()
    return bare_backbones(train_state, train_state.make_views(crops))


def two(train_state: TrainState, place: Place) -> CropBatch:
    return made_crops(train_state.method.view_spec, 2).to(place.device)


def loader(place: Place, batch: int, workers: int, rounds: int) -> dict[str, Any]:
    """Batches in page-locked memory, as a run gets them; the first of each worker do not count."""
    recipe, spec = loading(place, batch, workers)
    source, _ = photos(recipe)
    cpu: list[float] = []
    seconds = [
        loaded(our_batches(source, spec, recipe, place.device), workers, workers, cpu) for _ in range(min(rounds, 2))
    ]
    return {
        "images_per_second": batch / statistics.median(seconds),
        "images_per_second_of_a_core": batch / statistics.median(cpu),
    }


def loading(place: Place, batch: int, workers: int) -> tuple[Recipe, Any]:
    from clove_hub.methods.clove import view_spec

    recipe = sized(options(place, [f"batch.total={batch}", f"data.workers={workers}"]))
    return recipe, view_spec(recipe.method)


def from_photos(
    usual: Callable[[], tuple[Recipe, TrainState, CropBatch]], place: Place, batch: int, workers: int, steps: int
) -> dict[str, Any]:
    """Loader and step together; what the workers had ready is used up before it counts."""
    recipe, _ = loading(place, batch, workers)
    source, _ = photos(recipe)
    before, count = (1, 1) if place.rehearse else (2 * workers, 4 * steps)
    waited: list[float] = []
    seconds = paced(ours(source, recipe, usual()[1], before + count), place.device, before, count, waited)
    return {"images_per_second": batch / seconds, "ms": 1000 * seconds, "waiting_for_data_ms": 1000 * waited[0]}


def beside_released(
    usual: Callable[[], tuple[Recipe, TrainState, CropBatch]], place: Place, rounds: int, steps: int
) -> dict[str, Any]:
    """By turns on the same crops; theirs on views that are ready, ours with the device stage. And their loader."""
    recipe, train_state, crops = usual()
    released = open_released(place.reference, train_state.method.view_spec)
    assert released is not None
    theirs = ReleasedStep(released, recipe, place.device)
    pictures, boxes = as_released(train_state.make_views(crops))
    sides: dict[str, Sample] = {
        "ours": several(partial(step, train_state, crops), place.device, steps),
        "released": several(lambda: theirs(pictures, boxes, RATE, MOMENTUM), place.device, steps),
    }
    batch, seconds = recipe.batch.total, by_turns(sides, rounds)
    memory = {
        "ours": peak_memory(partial(step, train_state, crops), place.device),
        "released": peak_memory(lambda: theirs(pictures, boxes, RATE, MOMENTUM), place.device),
    }
    found: dict[str, Any] = {name: batch / statistics.median(values) for name, values in seconds.items()}
    ratio = [b / a for a, b in zip(seconds["ours"], seconds["released"], strict=True)]
    found |= {"times_faster": spread(ratio), "peak_gb": memory}
    try:
        workers = max(len(os.sched_getaffinity(0)) - 1, 1)
        small_batch = min(batch, 64)
        batches = released_loader(released_dataset(released, recipe), small_batch, 4 * workers, workers, place.on_gpu)
        found["released_loader_images_per_second"] = small_batch / loaded(iter(batches), workers, workers, [])
    except Exception as error:  # the step's figures are worth more than the loader's
        found["released_loader_error"] = str(error)
    return found


def profile(action: Callable[[], None], place: Place, journal: Journal) -> dict[str, Any]:
    """Torch's table of two steps, beside the JSON file; and the largest entries."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if place.on_gpu:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    action()
    synchronize(place.device)
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(2):
            action()
        synchronize(place.device)
    by = "self_device_time_total" if place.on_gpu else "self_cpu_time_total"
    path = journal.path.with_name("gpu_profile.txt")
    averages = profiler.key_averages()
    path.write_text(averages.table(sort_by=by, row_limit=60, max_name_column_width=90))
    largest = sorted(averages, key=lambda one: -getattr(one, by))[:25]
    return {one.key[:120]: getattr(one, by) / 2000 for one in largest}


def nvidia_smi(place: Place) -> str | None:
    if not place.on_gpu:
        return None
    asked = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.draw,power.limit"
    try:
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def collect(device: torch.device) -> None:
    gc.collect()
    torch.compiler.reset()  # the next size is no reason to compile for varying ones
    if device.type == "cuda":
        torch.cuda.empty_cache()
