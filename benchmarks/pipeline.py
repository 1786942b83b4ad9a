"""From photos to views: `python -m benchmarks.pipeline --data PHOTOS [--reference CLONE]`.

The worker stage through a DataLoader, with the same photos, batch and number of workers as the released transform; both
on one core without a DataLoader; decoding alone; our device stage alone. The released transform does in the worker
what our device stage does later, so on a CPU the two stages together are compared as well.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from clove_hub.data.images import decode
from clove_hub.methods.clove import view_spec
from clove_hub.training.data import make_loader
from clove_hub.training.recipe import Recipe
from clove_hub.training.sources import Source
from clove_hub.views import DeviceViews, ViewSpec

from . import report
from .measure import Sample, by_turns, timed
from .released import open_released, released_dataset, released_loader
from .setting import arguments, as_number, command, made_crops, photos, positive, settings, sized

TICK = 0.01
"""Seconds; the finest that processor time is told in."""


def main(given: list[str] | None = None) -> None:
    parser = arguments("pipeline", "Measures the way from photos to views.", data=True)
    parser.add_argument("--images", type=int, default=48, help="images of a turn on one core (default: %(default)s)")
    parser.add_argument(
        "--batches", type=int, default=4, help="batches of a turn for each worker (default: %(default)s)"
    )
    options = parser.parse_args(given)
    positive([("--rounds", options.rounds), ("--images", options.images), ("--batches", options.batches)])
    recipe = sized(options, "batch.total=32")
    device = torch.device(options.device)
    spec = view_spec(recipe.method)
    source, described = photos(recipe)
    released = open_released(options.reference, spec)
    dataset = released_dataset(released, recipe) if released else None
    workers, batch = as_number(recipe.data.workers), recipe.batch.total
    positive([("data.workers", workers)])

    rows = []
    # ---- through a DataLoader ------------------------------------------------------------------------------------
    batches = options.batches * workers
    cpu: dict[str, list[float]] = {"ours": [], "released": []}
    loaders: dict[str, Sample] = {
        "ours": lambda: loaded(our_batches(source, spec, recipe, device), workers, batches, cpu["ours"])
    }
    if dataset is not None:
        loaders["released"] = lambda: loaded(
            iter(released_loader(dataset, batch, batches + 3 * workers, workers, device.type == "cuda")),
            workers,
            batches,
            cpu["released"],
        )
    seconds = by_turns(loaders, options.rounds)
    rows.append(report.images_per_second(f"worker stage, DataLoader with {workers} workers", seconds, batch))
    spent = {name: values[1:] for name, values in cpu.items() if values}
    rows.append(report.images_per_second("  for each second of a worker's core", spent, batch))

    # ---- on one core, without a DataLoader -----------------------------------------------------------------------
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    count = options.images
    one: dict[str, Sample] = {"ours": _one_core(source, spec, recipe, count, None)}
    if device.type == "cpu":
        one["both stages"] = _one_core(source, spec, recipe, count, DeviceViews(spec))
    decoding: dict[str, Sample] = {"ours": lambda: _decoded(source, count)}
    if dataset is not None:
        one["released"] = lambda: _per_item(count, lambda i: dataset[_spaced(i, count, len(dataset))])
        decoding["released"] = lambda: _per_item(
            count, lambda i: dataset.loader(dataset.samples[_spaced(i, count, len(dataset))][0])
        )
    seconds = by_turns(one, options.rounds)
    rows.append(report.images_per_second("worker stage, one core", seconds))
    if "both stages" in one:
        rows.append(report.images_per_second("worker and device stage, one core", seconds, ours="both stages"))
    rows.append(report.images_per_second("decoding alone, one core", by_turns(decoding, options.rounds)))
    torch.set_num_threads(threads)

    # ---- the device stage alone ----------------------------------------------------------------------------------
    on_device = sized(options).batch.total
    make_views = DeviceViews(spec).to(device)
    crops = made_crops(spec, on_device).to(device)
    seconds = by_turns({"ours": timed(lambda: make_views(crops), device)}, options.rounds)
    rows.append(report.images_per_second(f"device stage, batch {on_device}", seconds, on_device))

    report.write(
        options.name,
        device,
        rows,
        settings(recipe, spec, workers=workers, rounds=options.rounds, **described),
        options.reference,
        options.results,
    )


def our_batches(
    source: Source, spec: ViewSpec, recipe: Recipe, device: torch.device, stop: int = 10**6
) -> Iterator[Any]:
    """The product's loader, as a run on one device sets it up."""
    batch = recipe.batch.total
    loader = make_loader(
        source,
        spec,
        seed=recipe.run.seed,
        global_batch=batch,
        micro_batch=batch,
        rank=0,
        world=1,
        start_step=0,
        stop_step=stop,
        workers=as_number(recipe.data.workers),
        pin_memory=device.type == "cuda",
    )
    return iter(loader)


def loaded(batches: Iterator[Any], workers: int, count: int, cpu: list[float]) -> float:
    """Seconds of a batch in the steady state, from the last of the workers' first batches on.

    Workers go in step and their batches come in bursts, so `count` is a multiple of their number. What the workers'
    cores spent on a batch is put into `cpu`.
    """
    for _ in range(workers):
        next(batches)
    before, start = _workers_cpu(), time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds, spent = time.perf_counter() - start, _workers_cpu() - before
    cpu.append(max(spent, TICK) / count)
    return seconds / count


def _workers_cpu() -> float:
    """Seconds of computing that this process's children have done."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return float(sum(time.user + time.system for time in times))


def _one_core(source: Source, spec: ViewSpec, recipe: Recipe, count: int, make_views: DeviceViews | None) -> Sample:
    """Our stages in this process: seconds of one image."""
    batch = min(recipe.batch.total, count)

    def sample() -> float:
        loader = make_loader(
            source,
            spec,
            seed=recipe.run.seed,
            global_batch=batch,
            micro_batch=batch,
            rank=0,
            world=1,
            start_step=0,
            stop_step=count // batch,
            workers=0,
            pin_memory=False,
        )
        start = time.perf_counter()
        for loaded in loader:
            if make_views is not None:
                make_views(loaded.crops)
        return (time.perf_counter() - start) / (count // batch * batch)

    return sample


def _decoded(source: Source, count: int) -> float:
    def one(index: int) -> None:
        encoded = source.read(_spaced(index, count, len(source)))
        decode(encoded.data, encoded.name)

    return _per_item(count, one)


def _per_item(count: int, action: Any) -> float:
    start = time.perf_counter()
    for index in range(count):
        action(index)
    return (time.perf_counter() - start) / count


def _spaced(number: int, count: int, length: int) -> int:
    """Indices spread over all photos, so that no folder stands for all."""
    return number * length // count % length


if __name__ == "__main__":
    command(main)
