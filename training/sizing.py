"""`batch.per_device=auto`: the largest forward pass that fits in memory, found by trying.

Each process tries complete steps on a separate method, which is built from the recipe and discarded: weights,
optimizer, statistics and random numbers of the run are not changed. The result is saved in the run's checkpoints, and a
resumed run uses it again, because sums over forward passes of another size are rounded differently.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from clove_hub.batch_norm import alone, batch_norms, group_batch_norms, settle_statistics
from clove_hub.global_state import kept_generators
from clove_hub.runs import STATE_FILE, checkpoint_folders
from clove_hub.views import CropBatch, ViewSpec, allocate, draw, write_sample

from .recipe import Recipe
from .run.host import (
    available_memory,
    core_quota,
    default_workers,
    forget_peak,
    held_memory,
    local_processes,
    own_cores,
    peak_memory,
    share_of_cores,
    trim,
)
from .run.peers import Peers
from .run.sampler import divide_norms, listed, possible_passes
from .step import assemble, passes

log = logging.getLogger(__name__)

HOST_SPARE = 0.2
"""Share of the host's available memory that a CPU's trial leaves, for data-loading workers and cached files."""
DEVICE_SPARE = 0.1
"""Share of an accelerator's memory that a trial does without: buffers of communication, evaluations, fragments."""


class OutOfMemory(OSError):
    """A device's memory does not hold a step; the message says what to do."""


def images_in_pass(recipe: Recipe, accelerator: Accelerator, peers: Peers, run: Path) -> int:
    """`batch.per_device` as a number, the same on all processes, which call this together.

    Args:
        run: the run's folder, where a resumed run finds the size measured before.

    Raises:
        ValueError: it is `auto`, and the smallest forward pass does not fit.
    """
    if recipe.batch.per_device != "auto":
        return recipe.batch.per_device
    before = peers.from_main(measured_before(run))
    on_host = accelerator.device.type == "cpu"
    with peers.together():
        sizes = [size for size in sizes_of(recipe, accelerator, peers.world) if size <= (before or size)]
        budget = (1 - HOST_SPARE) * available_memory() / local_processes() if on_host else math.inf
        own, needed = largest(sizes, step_memory(recipe, accelerator), budget)
        if own is None:
            raise ValueError(too_small(sizes[0], needed, budget, accelerator.device))
    cleared(accelerator.device)
    found = min(size for _, size in peers.gathered(own))
    log.info("batch.per_device=auto: %d images (possible: %s), which take %.3g GB", found, listed(sizes), needed / 1e9)
    if before and found < before:
        log.warning(
            "batch.per_device=auto finds memory for %d images where this run had %d: it resumes with sums that are rounded "
            "differently",
            found,
            before,
        )
    return found


def measured_before(run: Path) -> int | None:
    """The size that an existing run has measured; None if there is no run, or if a number was given."""
    for folder in checkpoint_folders(run)[:1]:
        # Opening the folder reports what is wrong with it.
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            if state["recipe"]["batch"]["per_device"] == "auto":
                return int(state["per_device"])
    return None


def sizes_of(recipe: Recipe, accelerator: Accelerator, world: int) -> list[int]:
    """The images that a forward pass of a process may have, the fewest first.

    Raises:
        ValueError: the batch does not divide, or batch norm's groups cannot be formed.
    """
    total, group = recipe.batch.total, recipe.batch.norm_group or recipe.batch.total
    with kept_generators():
        normalizes = any(batch_norms(assemble(recipe, accelerator).method))
    sizes = possible_passes(group if normalizes else None, total, world)
    if not sizes:
        divide_norms(recipe.batch.norm_group, total, total // world, world)  # raises the reason
    return sizes


def largest(
    sizes: Sequence[int], need: Callable[[int], tuple[float, float]], budget: float = math.inf
) -> tuple[int | None, float]:
    """The largest size that fits, and its memory; or None and the smallest size's memory if that does not fit.

    Sizes grow at most by doubling, so that one that is far too large is never tried: a host that runs out of memory
    kills processes instead of raising an error.

    Args:
        sizes: to choose from, the smallest first.
        need: tries a size, and raises torch's error where memory runs out; the bytes that it takes without any image, and
            with all.
        budget: bytes that there are, where they are known.
    """
    needs: dict[int, float] = {0: 0.0}
    too_large, last = math.inf, 0
    while left := [size for size in sizes if last < size < too_large]:
        size = max([size for size in left if size <= 2 * last] or left[:1])
        if expected(needs, size) > budget:
            too_large = size
            continue
        try:
            fixed, needed = need(size)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            fixed = needed = math.inf
        if needed > budget or needed == math.inf:
            too_large = size
            if not last:
                return None, needed
        else:
            last, needs[size] = size, needed
            needs[0] = min(fixed, needed)
    return last, needs[last]


def expected(needs: dict[int, float], size: int) -> float:
    """What a size will need: on a line through the last two that were tried, of which the first may be without images."""
    (before, less), (last, most) = list(needs.items())[-2:] if len(needs) > 1 else [(0, 0.0), (1, 0.0)]
    return most + (most - less) / (last - before) * (size - last)


def step_memory(recipe: Recipe, accelerator: Accelerator) -> Callable[[int], tuple[float, float]]:
    """What tries steps with forward passes of so many images, for `largest`."""
    device = accelerator.device
    before = cleared(device)

    def need(images: int) -> tuple[float, float]:
        cleared(device)
        try:
            with kept_generators(), alone(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the run itself shows them
                kept = try_steps(recipe, accelerator, images)
            return kept - before, peak(device) - before
        finally:
            accelerator.free_memory()  # which has a reference to the method

    return need


def try_steps(recipe: Recipe, accelerator: Accelerator, images: int) -> int:
    """Two passes, of which the second has beside it what stays: the optimizer's tensors, and gradients if they accumulate.

    Returns:
        The bytes that this process holds after them.

    Raises:
        RuntimeError: there is not as much memory (torch.OutOfMemoryError on an accelerator).
    """
    device = accelerator.device
    spare = None
    if device.type == "cuda":
        spare = torch.empty(int(DEVICE_SPARE * torch.cuda.mem_get_info(device)[1]), dtype=torch.uint8, device=device)
    # torch would compile for each size, later for varying sizes; compiled code takes less memory.
    train_state = assemble(replace(recipe, run=replace(recipe.run, compile=False)), accelerator)
    method, group = train_state.method, recipe.batch.norm_group or recipe.batch.total
    if any(batch_norms(method)):
        images = max(images, 2)  # one image is normalized with those of other processes, of which there are none here
        group_batch_norms(method, group if images % group == 0 else images, images)
    train_state.model = accelerator.prepare_model(method, evaluation_mode=True)  # not wrapped for several processes
    accumulates = images * accelerator.num_processes < recipe.batch.total
    for _ in range(2):
        method.begin_step(1.0, math.inf)
        passes(train_state, [made_crops(method.view_spec, images).to(device)], 1)
        settle_statistics(method, 1)
        train_state.optimizer.step()
        if not accumulates:
            train_state.optimizer.zero_grad()
    del spare
    return held(device)


def made_crops(spec: ViewSpec, samples: int) -> CropBatch:
    """Crops of a made-up picture, drawn as those of photos are; the same for each sample."""
    picture = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    batch, views = allocate(spec, samples), draw(spec, 0, 0, 0, 375, 500)
    for index in range(samples):
        write_sample(batch, index, picture, views)
    return batch


def cleared(device: torch.device) -> int:
    """Free unused memory and reset the peak; return the bytes that this process holds."""
    clear_device_cache(garbage_collection=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak()
    return held(device)


def held(device: torch.device) -> int:
    """Bytes that this process holds now of the device's memory, on a CPU of the host's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    trim()
    return held_memory()


def peak(device: torch.device) -> int:
    """Bytes that the process has held at most."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def workers_of(asked: int | Literal["auto"], peers: Peers) -> int:
    """Data-loading workers for this process; all processes call this together.

    Args:
        asked: `data.workers`.
    """
    host = socket.gethostname()
    everyone = [value for _, value in peers.gathered((host, own_cores()))]
    share = share_of_cores(own_cores(), [cores for name, cores in everyone if name == host], core_quota())
    if asked == "auto":
        log.info("data.workers=auto: %d, as this process has %.3g cores", default_workers(share), share)
        return default_workers(share)
    if asked > max(1, share) and [name for name, _ in everyone].index(host) == peers.rank:  # once for a host
        log.warning(
            "data.workers=%d is more than the %.3g cores that each process has on %s, so workers wait for each other: "
            "data.workers=auto takes %d",
            *(asked, share, host, default_workers(share)),
        )
    return asked


# ---- messages --------------------------------------------------------------------------------------------------------


def too_small(size: int, needed: float, budget: float, device: torch.device) -> str:
    """What to do where the smallest forward pass does not fit."""
    takes = "" if needed == math.inf else f": it takes {needed / 1e9:.3g} GB, and {budget / 1e9:.3g} GB may be used"
    return (
        f"batch.per_device=auto: the smallest forward pass, of {counted(size)}, does not fit in the memory of {device}"
        f"{takes}. {LESS}"
    )


def out_of_memory(recipe: Recipe, images: int, smaller: Sequence[int], error: RuntimeError) -> str:
    """What to do where a step of a run does not fit."""
    asked = recipe.batch.per_device
    ways = [] if asked == "auto" else ["batch.per_device=auto, which finds what fits"]
    ways += [f"batch.per_device={listed(smaller)}"] * bool(smaller)
    again = f"Start again with {', or with '.join(ways)}; the run resumes. " if smaller else ""
    return (
        f"a forward pass of {counted(images)} (batch.per_device={asked}) does not fit in memory "
        f"({str(error).splitlines()[0]:.120}). {again or LESS}"
    )


def counted(images: int) -> str:
    return f"{images} image{'s' * (images > 1)}"


LESS = (
    "Free memory that other programs use, or train with less: backbone.grad_checkpointing=true, run.precision=bf16, "
    "another backbone.model, smaller or fewer views"
)


@contextlib.contextmanager
def memory_explained(recipe: Recipe, images: int, world: int, normalizes: bool) -> Iterator[None]:
    """Turn an out-of-memory error of the device into an `OutOfMemory` that says what to do, within the context.

    Args:
        images: of a forward pass of each of `world` processes.
        normalizes: whether the method has batch norm.
    """
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        group = recipe.batch.norm_group or recipe.batch.total if normalizes else None
        smaller = [size for size in possible_passes(group, recipe.batch.total, world) if size < images]
        raise OutOfMemory(out_of_memory(recipe, images, smaller, error)) from error
