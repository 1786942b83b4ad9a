"""Training from photos: `python -m benchmarks.end_to_end --data PHOTOS [--reference CLONE]`.

Loader and step together, against the same step on crops that lie on the device (the synthetic rate) and against the
released loader with the released step; how long the host waits for data; and where that stands below the hardware's roof.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from clove_hub.training.recipe import Recipe
from clove_hub.training.sources import Source
from clove_hub.training.step import TrainState, on_device

from . import report
from .measure import Sample, by_turns, spread, synchronize
from .pipeline import loaded, our_batches
from .released import ReleasedStep, open_released, released_dataset, released_loader
from .setting import arguments, as_number, command, made_crops, make_accelerator, photos, positive, settings, sized
from .train_state import (
    MOMENTUM,
    RATE,
    bare_backbones,
    make_train_state,
    peak_memory,
    roofline,
    several,
    step,
)


def main(given: list[str] | None = None) -> None:
    parser = arguments("end_to_end", "Measures training from photos to weights.", data=True)
    parser.add_argument("--steps", type=int, help="steps of a turn (default: 2 on a CPU, two for each worker on a GPU)")
    options = parser.parse_args(given)
    recipe = sized(options)
    workers, batch = as_number(recipe.data.workers), recipe.batch.total
    steps = options.steps or (2 if options.device == "cpu" else 2 * workers)
    positive([("--rounds", options.rounds), ("--steps", steps), ("data.workers", workers)])
    accelerator = make_accelerator(recipe, options.device)
    device = accelerator.device
    train_state = make_train_state(recipe, accelerator)
    spec = train_state.method.view_spec
    source, described = photos(recipe)
    released = open_released(options.reference, spec)
    # The first steps warm up and use up what the workers have ready, so that a loader that is too slow shows.
    before = 1 if device.type == "cpu" else workers

    crops = made_crops(spec, batch).to(device)
    waited: dict[str, list[float]] = {"ours": [], "released": []}
    sides: dict[str, Sample] = {
        "synthetic": several(partial(step, train_state, crops), device, steps),
        "ours": lambda: paced(ours(source, recipe, train_state, before + steps), device, before, steps, waited["ours"]),
        "loader": lambda: loaded(our_batches(source, spec, recipe, device), workers, workers, []),
        "bare": several(bare_backbones(train_state, train_state.make_views(crops)), device, steps),
    }
    if released:
        theirs, dataset = ReleasedStep(released, recipe, device), released_dataset(released, recipe)

        def released_sample() -> float:
            loader = released_loader(dataset, batch, before + steps + 2 * workers, workers, device.type == "cuda")
            batches = (lambda images=data[0], boxes=data[1]: theirs(images, boxes, RATE, MOMENTUM) for data in loader)
            return paced(batches, device, before, steps, waited["released"])

        sides["released"] = released_sample

    seconds = by_turns(sides, options.rounds)
    rows = [
        report.images_per_second(f"from photos, batch {batch}, {workers} workers", seconds, batch),
        report.images_per_second("on crops that lie on the device (synthetic)", {"ours": seconds["synthetic"]}, batch),
        report.images_per_second("the loader alone", {"ours": seconds["loader"]}, batch),
        report.images_per_second("bare backbones, ready views (the limit)", {"ours": seconds["bare"]}, batch),
        report.Row(
            "the host's waiting for data, a step",
            "ms",
            1000 * statistics.median(waited["ours"][1:]),
            1000 * statistics.median(waited["released"][1:]) if released else None,
        ),
    ]
    of_synthetic = spread([best / own for own, best in zip(seconds["ours"], seconds["synthetic"], strict=True)])
    rates = {name: batch / statistics.median(values) for name, values in seconds.items()}
    memory = peak_memory(partial(step, train_state, crops), device)
    assert train_state.finite, "a step that is not finite is not a step"
    low, high = of_synthetic["min"], of_synthetic["max"]
    print(f"of the synthetic rate: {of_synthetic['median']:.3f} ({low:.3f}-{high:.3f})")
    roof = roofline(train_state, rates["ours"], rates["bare"], memory, options.rounds)
    report.write(
        options.name,
        device,
        rows,
        settings(recipe, spec, workers=workers, steps=steps, rounds=options.rounds, **described),
        options.reference,
        options.results,
        of_synthetic=of_synthetic,
        roofline=roof,
    )


def ours(source: Source, recipe: Recipe, train_state: TrainState, steps: int) -> Iterator[Callable[[], None]]:
    """The product's steps from photos, each still to be taken."""
    device = train_state.accelerator.device
    # More than are taken, so that the workers do not run out of work before the end.
    stop = steps + 2 * as_number(recipe.data.workers)
    batches = on_device(our_batches(source, train_state.method.view_spec, recipe, device, stop), device)
    for number, batch in enumerate(batches, start=1):

        def take(crops: Any = batch.crops, look: bool = number % recipe.run.log_every == 0) -> None:
            step(train_state, crops)
            if look:  # as the training loop does, which keeps the host from running away
                bool(train_state.finite)

        yield take


def paced(
    pending: Iterator[Callable[[], Any]], device: torch.device, before: int, count: int, waited: list[float]
) -> float:
    """Seconds of a step, over `count` steps after `before` that do not count; the wait for each step's data apart."""
    for _ in range(before):
        next(pending)()
    synchronize(device)
    waiting, start = 0.0, time.perf_counter()
    for _ in range(count):
        asked = time.perf_counter()
        take = next(pending)
        waiting += time.perf_counter() - asked
        take()
    synchronize(device)
    waited.append(waiting / count)
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    command(main)
