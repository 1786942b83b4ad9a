"""From photos to views: `python -m benchmarks.pipeline --data PHOTOS [--reference CLONE] [--peers PYTHON]`.

The worker stage through a DataLoader, with the same photos, batch and number of workers as the released transform and as
lightly's DINO transform, by turns; all on one core without a DataLoader; decoding alone; our device stage alone. The others
do in the worker what our device stage does later, so on a CPU the two stages together are compared as well.
"""

from __future__ import annotations

import argparse
import contextlib
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
from .lightly_side import Lightly
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
    parser.add_argument("--peers", metavar="PYTHON", help="of an environment that has lightly, to compare")
    options = parser.parse_args(given)
    positive([("--rounds", options.rounds), ("--images", options.images), ("--batches", options.batches)])
    with contextlib.ExitStack() as stack:
        measure(options, stack)


def measure(options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    """Measures and writes the file; what runs meanwhile ends with the stack."""
    recipe = sized(options, "batch.total=32")
    device = torch.device(options.device)
    spec = view_spec(recipe.method)
    source, described = photos(recipe)
    released = open_released(options.reference, spec)
    dataset = released_dataset(released, recipe) if released else None
    workers, batch = as_number(recipe.data.workers), recipe.batch.total
    positive([("data.workers", workers)])
    lightly = stack.enter_context(Lightly(options.peers, recipe, spec, workers)) if options.peers else None

    rows = []
    # ---- through a DataLoader ------------------------------------------------------------------------------------
    batches = options.batches * workers
    through = batches + 3 * workers
    cpu: dict[str, list[float]] = {"ours": [], "both stages": [], "released": [], "lightly": []}
    loaders: dict[str, Sample] = {
        "ours": lambda: loaded(our_batches(source, spec, recipe, device), workers, batches, cpu["ours"])
    }
    if device.type == "cpu":
        make_both = DeviceViews(spec)
        loaders["both stages"] = lambda: loaded(
            (make_both(one.crops) for one in our_batches(source, spec, recipe, device)),
            workers,
            batches,
            cpu["both stages"],
            whole=True,
        )
    if dataset is not None:
        loaders["released"] = lambda: loaded(
            iter(released_loader(dataset, batch, through, workers, device.type == "cuda")),
            workers,
            batches,
            cpu["released"],
        )
    if lightly:
        loaders["lightly"] = lambda: loaded(lightly.batches(through), workers, batches, cpu["lightly"])
    seconds = by_turns(loaders, options.rounds)
    spent = {name: values[1:] for name, values in cpu.items() if values}
    for ours, stage, cores in (("ours", "worker stage", "a worker's"), ("both stages", "both stages", "a")):
        if ours in seconds:
            name = f"{stage}, DataLoader with {workers} workers"
            rows.append(report.images_per_second(name, seconds, batch, ours))
            rows.append(report.images_per_second(f"  for each second of {cores} core", spent, batch, ours))

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
    if lightly:
        one["lightly"] = lambda: lightly.seconds([_spaced(i, count, len(source)) for i in range(count)]) / count
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
        settings(
            recipe,
            spec,
            workers=workers,
            rounds=options.rounds,
            **described,
            **({"lightly": lightly.version} if lightly else {}),
        ),
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
        cache=recipe.data.cache,
    )
    return iter(loader)


def loaded(batches: Iterator[Any], workers: int, count: int, cpu: list[float], whole: bool = False) -> float:
    """Seconds of a batch in the steady state, from the last of the workers' first batches on.

    Workers go in step and their batches come in bursts, so `count` is a multiple of their number. What the workers'
    cores spent on a batch is put into `cpu`; with `whole` what this process spent as well.
    """
    for _ in range(workers):
        next(batches)
    before, start = _spent(whole), time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds, spent = time.perf_counter() - start, _spent(whole) - before
    cpu.append(max(spent, TICK) / count)
    return seconds / count


def _spent(whole: bool) -> float:
    """Seconds of computing that this process's children, and theirs, have done; with `whole` this process as well."""
    own = psutil.Process()
    times = [child.cpu_times() for child in [*own.children(recursive=True), *([own] if whole else [])]]
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
