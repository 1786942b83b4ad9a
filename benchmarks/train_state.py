"""The product's training step on made-up crops: its steps, what its parts take, and what the hardware could do at most."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from unittest import mock

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from clove_hub.backbones import feature_map
from clove_hub.training.recipe import Recipe
from clove_hub.training.step import TrainState, assemble, prepare, take_step
from clove_hub.views import CropBatch, Views

from .measure import Sample, by_turns, spread, synchronize, timed
from .setting import made_crops

RATE, MOMENTUM = 1e-3, 0.99
"""Learning rate and teacher momentum of every step that is measured; small, so that weights stay finite."""

MATMUL = {"cuda": 8192, "cpu": 2048}
"""Side of the square matrices whose product is the hardware's peak."""


def make_train_state(recipe: Recipe, accelerator: Accelerator) -> TrainState:
    train_state = assemble(recipe, accelerator)
    prepare(train_state)
    return train_state


def step(train_state: TrainState, crops: CropBatch) -> None:
    take_step(train_state, [crops], 1, RATE, MOMENTUM, epoch=0.0)


def step_on(train_state: TrainState, views: list[Views], crops: CropBatch) -> None:
    """A step whose views are ready."""
    with mock.patch.object(train_state, "make_views", return_value=views):
        step(train_state, crops)


def several(action: Callable[[], object], device: torch.device, steps: int) -> Sample:
    """A sample of `steps` steps in a row; on CUDA after one that does not count, with memory of its own."""

    def sample() -> float:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            action()
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            action()
        synchronize(device)
        return (time.perf_counter() - start) / steps

    return sample


def peak_memory(action: Callable[[], object], device: torch.device) -> float | None:
    """Gigabytes that the action takes on top of what is there already; None on a CPU, which does not say."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    action()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e9


def shares(action: Callable[[], object], device: torch.device, steps: int) -> dict[str, float]:
    """The share of each of the step's named ranges in `steps` steps, the device waited for at both ends of each.

    `rest` is what no range covers: moving the teacher, above all.
    """
    seconds: dict[str, float] = defaultdict(float)
    with _ranges_into(seconds, device):
        action()
        seconds.clear()
        start = time.perf_counter()
        for _ in range(steps):
            action()
        synchronize(device)
        total = time.perf_counter() - start
    found = {name: value / total for name, value in seconds.items()}
    return {**found, "rest": 1 - sum(found.values())}


@contextmanager
def _ranges_into(seconds: dict[str, float], device: torch.device) -> Iterator[None]:
    """Within the context the product's profiler ranges add up their seconds instead."""

    class Range:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            synchronize(device)
            self.start = time.perf_counter()

        def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
            synchronize(device)
            seconds[self.name] += time.perf_counter() - self.start

    ranged = [
        name
        for name, module in sys.modules.items()
        if name.startswith(("clove_hub.", "training."))
        and getattr(module, "record_function", None) is torch.profiler.record_function
    ]
    patches = [mock.patch(f"{name}.record_function", Range) for name in ranged]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def bare_backbones(train_state: TrainState, views: list[Views]) -> Callable[[], None]:
    """Student forward and backward on all views and teacher forward on the large ones, nothing else: the limit."""
    student, teacher = (train_state.method.get_submodule(f"{name}.backbone") for name in ("student", "teacher"))
    large = train_state.method.settings.global_views

    def action() -> None:
        with train_state.accelerator.autocast():
            maps = [feature_map(student, group.pixels.flatten(0, 1)) for group in views]
            with torch.no_grad():
                feature_map(teacher, views[0].pixels[:large].flatten(0, 1))
        torch.autograd.backward(maps, [torch.ones_like(one) for one in maps])
        student.zero_grad()

    return action


def flops_per_image(train_state: TrainState, crops: CropBatch) -> float:
    """Floating-point operations of a step for each image, a multiplication with its addition being two."""
    with FlopCounterMode(display=False) as counter:
        step(train_state, crops)
    flops: int = counter.get_total_flops()
    return flops / crops.crops[0].shape[1]


def matmul_peak(device: torch.device, precision: str, rounds: int) -> float:
    """TFLOP/s of a large square product in the step's precision."""
    side = MATMUL[device.type]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = by_turns({"matmul": timed(lambda: torch.mm(a, b, out=out), device)}, rounds)["matmul"]
    return 2 * side**3 / spread(seconds)["median"] / 1e12


def roofline(
    train_state: TrainState, rate: float, limit: float, memory: float | None, rounds: int
) -> dict[str, float | None]:
    """Where a rate of training stands below what the hardware gives; printed as well.

    Args:
        rate: of training, in images/s.
        limit: of the bare backbones.
        memory: of a step, in GB.
    """
    precision = {"no": "fp32"}.get(train_state.accelerator.mixed_precision, train_state.accelerator.mixed_precision)
    device = train_state.accelerator.device
    flops = flops_per_image(train_state, made_crops(train_state.method.view_spec, 2).to(device))
    peak, tflops = matmul_peak(device, precision, rounds), rate * flops / 1e12
    print(
        f"roofline: {rate:.4g} images/s of {limit:.4g} of the bare backbones ({100 * rate / limit:.0f} %), "
        f"{tflops:.3g} TFLOP/s of {peak:.3g} of a matrix product ({100 * tflops / peak:.0f} %), "
        + (f"peak memory {memory:.3g} GB" if memory is not None else "peak memory not known on a CPU")
    )
    return {
        "images_per_second": rate,
        "limit_images_per_second": limit,
        "share_of_limit": rate / limit,
        "gflop_per_image": flops / 1e9,
        "tflop_per_second": tflops,
        "matmul_peak_tflop_per_second": peak,
        "share_of_peak": tflops / peak,
        "peak_memory_gb": memory,
    }
