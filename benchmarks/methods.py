"""What each method costs beside CLoVE: `python -m benchmarks.methods [--ship]`.

A whole step of every registered method, by turns in one run, with the views of its first recipe and as many images for
all; and the memory that it takes. `--ship` writes what `clove-hub methods` and the documentation say of it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from clove_hub.training.listing import BESIDE, recipes
from clove_hub.training.step import TrainState

from . import report
from .measure import by_turns
from .setting import arguments, command, made_crops, make_accelerator, positive, settings, sized
from .train_state import make_train_state, peak_memory, several, step

COSTS = report.ROOT / "clove_hub" / "methods" / "costs.json"


def main(given: list[str] | None = None) -> None:
    parser = arguments("methods", "Measures what each method's step costs.", data=False)
    parser.add_argument("--steps", type=int, help="steps of a turn (default: 1 on a CPU, 5 on a GPU)")
    parser.add_argument(
        "--ship",
        nargs="?",
        type=Path,
        const=COSTS,
        metavar="FILE",
        help=f"write what clove-hub tells users (default: {COSTS.relative_to(report.ROOT)})",
    )
    options = parser.parse_args(given)
    steps = options.steps or (1 if options.device == "cpu" else 5)
    positive([("--rounds", options.rounds), ("--steps", steps)])
    chosen = {name: sized(options, recipe=names[0]) for name, names in sorted(recipes().items())}
    accelerator = make_accelerator(chosen[BESIDE], options.device)
    device = accelerator.device
    train_states = {name: make_train_state(recipe, accelerator) for name, recipe in chosen.items()}
    batch = chosen[BESIDE].batch.total
    whole: dict[str, Callable[[], object]] = {}
    for name, train_state in train_states.items():
        whole[name] = partial(step, train_state, made_crops(train_state.method.view_spec, batch).to(device))

    seconds = by_turns({name: several(side, device, steps) for name, side in whole.items()}, options.rounds)
    memory = {name: held(train_states[name]) + peak(side, device) for name, side in whole.items()}
    assert all(bool(train_state.finite) for train_state in train_states.values()), (
        "a step that is not finite is not a step"
    )

    costs = {
        name: {
            # Turn by turn: what disturbs the machine disturbs neighbors alike.
            "speed": statistics.median(a / b for a, b in zip(seconds[BESIDE], seconds[name], strict=True)),
            "memory": memory[name] / memory[BESIDE],
        }
        for name in whole
    }
    for name, cost in costs.items():
        print(f"{name:<10} {cost['speed']:.2f} x images/s, {cost['memory']:.2f} x memory ({memory[name]:.2f} GB)")
    setting = {
        "device": report.hardware(device)["device"],
        "backbone": chosen[BESIDE].backbone.model,
        "batch": batch,
        "precision": chosen[BESIDE].run.precision,
        "torch": version("torch"),
    }
    shipped: dict[str, Any] = report.rounded({"setting": setting, "methods": costs})
    report.write(
        options.name,
        device,
        [report.images_per_second(f"step of {name}", seconds, batch, name) for name in whole],
        {name: settings(chosen[name], train_state.method.view_spec) for name, train_state in train_states.items()}
        | {"rounds": options.rounds, "steps": steps},
        None,
        options.results,
        memory_gb=memory,
        shipped=shipped,
    )
    if options.ship:
        options.ship.write_text(json.dumps(shipped, indent=1) + "\n")
        print(f"-> {options.ship}")


def held(train_state: TrainState) -> float:
    """Gigabytes of what stays between steps: student, teacher, queues and the optimizer's momenta."""
    tensors = list(train_state.method.state_dict().values())
    tensors += [value for state in train_state.optimizer.state.values() for value in state.values()]
    total: int = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total / 1e9


def peak(action: Callable[[], object], device: torch.device) -> float:
    """Gigabytes that a step takes on top of that."""
    found = peak_memory(action, device)
    if found is not None:
        return found
    # A CPU's allocator tells nobody but the profiler.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    levels: list[int] = [event["args"]["Total Allocated"] for event in memory]
    before: int = levels[0] - memory[0]["args"]["Bytes"]
    return (max(levels) - before) / 1e9


if __name__ == "__main__":
    command(main)
