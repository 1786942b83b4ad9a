"""Does every branch that a GPU alone takes do what it should? Each check returns what it saw and raises where that is wrong.

The checks are plain functions of a place, so that `tests/test_gpu.py` runs the same ones. On a CPU they take the CPU's branches:
that is the rehearsal.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import clove_hub
from clove_hub.global_state import kept_environment
from clove_hub.methods import METHODS
from clove_hub.runs import read_rows
from clove_hub.training.data import LoadedBatch
from clove_hub.training.loop import healthy, train
from clove_hub.training.pretrain import own_accelerator
from clove_hub.training.run.peers import Peers
from clove_hub.training.run.stopping import never
from clove_hub.training.sizing import cleared, images_in_pass, largest, memory_explained, step_memory
from clove_hub.training.step import TrainState, on_device
from clove_hub.views import DeviceViews
from clove_hub.weights import fingerprint

from ..setting import made_crops, make_accelerator, sized
from ..train_state import step, step_on
from .child import compiled_in_full, one_of_two, synchronized_norm
from .children import Children
from .journal import Journal
from .place import Place, built, options, recipe_of

STEPS = 3
SHUFFLED = ("moco", "moco_knn", "densecl")
"""Their keys are shuffled by the device's own generator, so that batch norm tells two devices apart."""
COMPILING = 150.0
"""Seconds that all compiling together may take, in processes beside the checks."""


def run(journal: Journal, place: Place) -> None:
    names = methods(place)
    with Children(place) as children:
        for name, check in telling().items():  # with the device to themselves
            journal.item(name, partial(alone, check, place), limit=60.0)
        start_compiling(children, place, journal.items, names[:1])
        for name, check in of_methods(names).items():
            journal.item(name, partial(alone, check, place), limit=60.0)
        start_compiling(children, place, journal.items, names[1:])
        for name in children.started:
            left = min(max(journal.left - 10, 0.1), COMPILING)  # those that are done are recorded at the end, too
            journal.item(name, partial(children.result, name, left), limit=left + 5, least=0.0)


def alone(check: Callable[[Place], Any], place: Place) -> Any:
    """A check with an accelerator of its own, whatever others have set up."""
    with kept_environment(), own_accelerator():
        return check(place)


def methods(place: Place) -> tuple[str, ...]:
    """A rehearsal has two, one with LARS and one with a queue: the others take the same way."""
    return ("clove", "moco") if place.rehearse else tuple(METHODS)


def telling() -> dict[str, Callable[[Place], Any]]:
    """By name, what a GPU alone can show of the whole; these come first."""
    return {
        "the device": the_device,
        "a run that is stopped goes on": resume,
        "batch.per_device=auto": per_device_auto,
        "out of memory is explained": out_of_memory,
        "two processes on one device by gloo": two_processes,
        "export of a run": export,
        "deferred finite flag": deferred_flag,
        "copy stream and pinned memory": copy_stream,
        "float16's scaler": scaler,
        "the views' device stage": views,
    }


def of_methods(names: Sequence[str]) -> dict[str, Callable[[Place], Any]]:
    """By name, what is asked of each method, and what takes longer."""
    return {
        **{f"a step of {name}": partial(a_step, name) for name in names},
        **{f"{name} on the device and on the CPU": partial(as_on_the_cpu, name) for name in names[:1]},
        "synchronized batch norm by nccl": synchronized,
        "precisions agree": precisions,
        "channels_last changes nothing": channels_last,
        "the same run twice": determinism,
        **{f"{name} on the device and on the CPU": partial(as_on_the_cpu, name) for name in names[1:]},
    }


def the_device(place: Place) -> dict[str, Any]:
    if not place.on_gpu:
        return {"device": "cpu"}
    properties, (free, total) = torch.cuda.get_device_properties(place.device), torch.cuda.mem_get_info(place.device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": total / 1e9,
        "free_gb": free / 1e9,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "cuda": torch.version.cuda,
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
    }


# ---- views and copies ------------------------------------------------------------------------------------------------


def views(place: Place) -> dict[str, float]:
    """In levels of 256: how far the device's views are from the CPU's."""
    spec = built("clove", place).method.view_spec
    batch = made_crops(spec, 8)
    expected, found = DeviceViews(spec)(batch), {}
    there = (batch.pin_memory() if place.on_gpu else batch).to(place.device, non_blocking=True)
    for dtype, limit in ((torch.float32, 0.2), (torch.float16, 2.0)):
        module = DeviceViews(spec, dtype).to(place.device)
        groups = module(there)
        waits = waited(lambda module=module: module(there), place)  # type: ignore[misc]
        assert not waits, f"the views wait for the device: {waits}"
        off = 0.0
        for ours, reference in zip(groups, expected, strict=True):
            levels = (
                (ours.pixels.cpu().double() - reference.pixels.double()) * 255 * torch.tensor(spec.std).view(3, 1, 1)
            )
            off = max(off, float(levels.abs().max()))
        found[str(dtype)] = off
        assert off < limit, f"{dtype} is off by {off:.3g} levels"
    return found


def copy_stream(place: Place) -> dict[str, int]:
    """Batches that are copied while the device is busy arrive whole and in order."""
    spec = built("clove", place).method.view_spec
    batches = []
    for number in range(8):
        crops = made_crops(spec, 16)
        for one in crops.crops:
            one.add_(number)
        batches.append(LoadedBatch(crops.pin_memory() if place.on_gpu else crops, [], []))
    expected = [[int(one.sum(dtype=torch.int64)) for one in batch.crops.crops] for batch in batches]
    busy, found = torch.randn(2048 if place.on_gpu else 64, 2048 if place.on_gpu else 64, device=place.device), []
    for batch in on_device(iter(batches), place.device):
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        found.append([one.sum(dtype=torch.int64) for one in batch.crops.crops])
        del batch  # its memory may be used again from here on
    assert [[int(value) for value in one] for one in found] == expected
    return {"batches": len(found)}


# ---- steps -----------------------------------------------------------------------------------------------------------


def losses(train_state: TrainState, place: Place, count: int = STEPS, samples: int = 0) -> list[float]:
    """Takes steps on made crops; the loss of each."""
    device = train_state.accelerator.device
    crops = made_crops(train_state.method.view_spec, samples or images(place)).to(device)
    found = []
    for number in range(count):
        torch.manual_seed(number)
        step(train_state, crops)
        found.append(float(train_state.figures[0]))
    return found


def images(place: Place) -> int:
    return recipe_of("clove", place).batch.total


def precision(place: Place) -> str:
    return f"run.precision={'bf16' if place.on_gpu else 'fp32'}"


def trained(train_state: TrainState) -> list[Tensor]:
    return [p.detach().clone() for p in train_state.method.parameters() if p.requires_grad]


def a_step(method: str, place: Place) -> dict[str, Any]:
    """In bf16 and channels_last: finite, the weights move, and after the first steps, which set up libraries, the host waits nowhere."""
    train_state = built(method, place, precision(place), "run.channels_last=true")
    before = trained(train_state)
    found = losses(train_state, place)
    moved = sum(not torch.equal(a, b) for a, b in zip(before, trained(train_state), strict=True))
    assert all(math.isfinite(value) for value in found), found
    assert healthy(train_state)
    assert moved > 0.5 * len(before), f"{moved} of {len(before)} tensors have moved"
    crops = made_crops(train_state.method.view_spec, images(place)).to(place.device)
    waits = waited(lambda: step(train_state, crops), place)
    assert not waits, f"the host waits for the device: {waits}"
    return {"losses": found, "deferred": train_state.deferred, "waits": len(waits)}


def waited(action: Callable[[], object], place: Place) -> list[str]:
    """Where the host has waited for the device, by torch's own watch; nothing on a CPU."""
    if not place.on_gpu:
        action()
        return []
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [
        f"{Path(one.filename).parent.name}/{Path(one.filename).name}:{one.lineno}"
        for one in said
        if "synchroniz" in str(one.message) and not str(one.message).startswith("Synchronization debug mode")
    ]


def deferred_flag(place: Place) -> dict[str, Any]:
    """After a step that is not finite nothing moves any more, and the host learns which step it was."""
    train_state = built("clove", place, precision(place))
    train_state.deferred = True
    crops = made_crops(train_state.method.view_spec, images(place)).to(place.device)
    step(train_state, crops)
    before = trained(train_state)
    ready = train_state.make_views(crops)
    ready[0].pixels[0, 0, 0, 0, 0] = math.nan
    step_on(train_state, ready, crops)
    step(train_state, crops)
    assert not healthy(train_state)
    assert int(train_state.steps) == 1, f"{int(train_state.steps)} good steps are counted, there was one"
    assert all(torch.equal(a, b) for a, b in zip(before, trained(train_state), strict=True)), "weights have moved"
    return {"figures": train_state.figures.tolist()}


def scaler(place: Place) -> dict[str, Any]:
    """A scale that is too large costs a step, and only that; then it is halved and training goes on."""
    if not place.on_gpu:
        return {"left out": "fp16 needs an accelerator"}
    train_state = built("clove", place, "run.precision=fp16")
    scaling = train_state.accelerator.scaler
    assert scaling is not None
    found = losses(train_state, place)
    scaling.update(2.0**40)
    before, scale = trained(train_state), scaling.get_scale()
    losses(train_state, place, 1)
    stayed = all(torch.equal(a, b) for a, b in zip(before, trained(train_state), strict=True))
    assert stayed, "a step with gradients that overflow has moved the weights"
    assert scaling.get_scale() < scale, "the scale has not fallen"
    assert healthy(train_state), "an overflow of the scaled gradient is no failure"
    scaling.update(2.0**10)
    losses(train_state, place, 1)
    assert not all(torch.equal(a, b) for a, b in zip(before, trained(train_state), strict=True)), "nothing moves again"
    return {"losses": found}


def as_on_the_cpu(method: str, place: Place) -> dict[str, Any]:
    """The same weights and crops in float32, without TF32: the first loss, and the gradient's norm."""
    found = []
    with full_float32():
        for device in ("cpu", place.device.type):
            with own_accelerator():
                train_state = built(method, place, "run.precision=fp32", device=device)
                losses(train_state, place, 1)
                found.append(train_state.figures.tolist())
    off = [abs(a - b) / max(abs(a), 1e-12) for a, b in zip(*found, strict=True)]
    limit = 0.05 if method in SHUFFLED else 2e-4
    assert off[0] < limit, f"loss {found[1][0]:.6g}, on the CPU {found[0][0]:.6g}"
    assert off[1] < max(limit, 0.02), f"gradient {found[1][1]:.6g}, on the CPU {found[0][1]:.6g}"
    return {"loss_off": off[0], "gradient_off": off[1]}


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def precisions(place: Place) -> dict[str, Any]:
    """The losses of a few steps in each precision."""
    names = ("fp32", "bf16", "fp16") if place.on_gpu else ("fp32", "bf16")
    found = {}
    for name in names:
        with own_accelerator():
            found[name] = losses(built("clove", place, f"run.precision={name}"), place, 5)
    for name in names[1:]:
        off = max(abs(a - b) / abs(a) for a, b in zip(found["fp32"], found[name], strict=True))
        assert off < 3e-3, f"{name} is off by {off:.3g}: {found}"
    return found


def channels_last(place: Place) -> dict[str, float]:
    with full_float32():
        found = [
            losses(built("clove", place, "run.precision=fp32", f"run.channels_last={on}"), place)
            for on in ("true", "false")
        ]
    off = max(abs(a - b) / abs(b) for a, b in zip(*found, strict=True))
    assert off < 1e-3, found
    return {"off": off}


def determinism(place: Place) -> dict[str, Any]:
    """Bit for bit or not is a finding; far off would be a fault."""
    runs = []
    for _ in range(2):
        train_state = built("clove", place, precision(place))
        losses(train_state, place, 5)
        runs.append(trained(train_state))
    off = max(float((a - b).abs().max()) for a, b in zip(*runs, strict=True))
    assert off < 1e-2, f"the same five steps twice are {off:.3g} apart"
    return {"bit_for_bit": off == 0, "largest_difference": off}


# ---- whole runs ------------------------------------------------------------------------------------------------------


def run_changes(place: Place, run: Path) -> list[str]:
    return [precision(place), "data.workers=2", "schedule.steps=6", "run.save_every=3", f"run.output={run}"]


def after(steps: int) -> Callable[[], contextlib.AbstractContextManager[Callable[[], int]]]:
    """A stop request that comes after so many steps."""

    @contextlib.contextmanager
    def requests() -> Iterator[Callable[[], int]]:
        asked = iter(range(10**6))
        yield lambda: 75 if next(asked) >= steps else 0

    return requests


def resume(place: Place) -> dict[str, Any]:
    """Six steps in one go beside three and three, through the loader with its workers."""
    whole, cut = place.work / "whole", place.work / "cut"
    for run, stop in ((whole, never), (cut, after(3)), (cut, never)):
        with own_accelerator():
            train(recipe_of("clove", place, *run_changes(place, run)), stop)
    one, other = (clove_hub.load_backbone(str(run)).model.state_dict() for run in (whole, cut))
    off = max(float((a.double() - other[name].double()).abs().max()) for name, a in one.items())
    seen = [[row["loss"] for row in read_rows(run / "metrics.jsonl")] for run in (whole, cut)]
    assert len(seen[0]) == len(seen[1]) == 6, seen
    assert np.allclose(seen[0], seen[1], rtol=1e-3), seen
    return {"bit_for_bit": off == 0, "largest_difference": off, "losses": seen}


def export(place: Place) -> dict[str, Any]:
    """A bundle of a run that was trained on the device has its weights, and gives the same maps on device and CPU."""
    run = place.work / "whole"
    if not (run / "recipe.yaml").is_file():
        with own_accelerator():
            train(recipe_of("clove", place, *run_changes(place, run)), never)
    bundle = clove_hub.export_run(run, place.work / "bundle", license="mit")
    ours, of_run = (clove_hub.load_backbone(str(source)) for source in (bundle, run))
    architecture = recipe_of("clove", place).backbone.model
    prints = [fingerprint(architecture, one.model.state_dict()) for one in (ours, of_run)]
    assert prints[0] == prints[1]
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), full_float32():
        expected = ours.maps(pixels)[0]
        found = clove_hub.load_backbone(str(bundle))
        found.model.to(place.device)
        maps = found.maps(pixels.to(place.device))[0]
    off = float((maps.cpu() - expected).abs().max() / expected.abs().max())
    assert off < 1e-3, f"maps on the device are off by {off:.3g}"
    return {"off": off}


def two_processes(place: Place) -> dict[str, Any]:
    """A run of two processes that share the device beside one of one process."""
    alone, together = place.work / "alone", place.work / "together"
    shape = ["batch.per_device=4", "batch.norm_group=4"]
    if not place.rehearse:
        shape = ["batch.per_device=16", "batch.norm_group=16"]
    words = [*run_changes(place, alone), *shape, "run.precision=fp32"]
    with own_accelerator():
        train(recipe_of("clove", place, *words), never)
    with Children(place) as children:
        port = free_port()
        for rank in range(2):
            children.start(f"rank {rank}", one_of_two, rank=rank, port=port, words=[*words, f"run.output={together}"])
        for rank in range(2):
            children.result(f"rank {rank}", 300.0)
    seen = [[row["loss"] for row in read_rows(run / "metrics.jsonl")] for run in (alone, together)]
    assert len(seen[0]) == len(seen[1]) == 6, seen
    assert np.allclose(seen[0], seen[1], rtol=1e-3), seen
    return {"losses": seen}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


def synchronized(place: Place) -> dict[str, Any]:
    """Torch's kernels for groups over GPUs beside the CPU's sums."""
    if not place.on_gpu:
        return {"left out": "nccl needs a GPU"}
    with Children(place) as children:
        children.start("nccl", synchronized_norm, port=free_port())
        found: dict[str, Any] = children.result("nccl", 300.0)
    return found


# ---- memory ----------------------------------------------------------------------------------------------------------


def per_device_auto(place: Place) -> dict[str, Any]:
    """The paper's step, of as many images as fit."""
    total, group = (8, 4) if place.rehearse else (256, 32)
    changes = [f"batch.total={total}", f"batch.norm_group={group}", "batch.per_device=auto"]
    recipe = sized(options(place, changes))
    accelerator = make_accelerator(recipe, place.device.type)
    found = images_in_pass(recipe, accelerator, Peers(1.0), place.work / "none")
    cleared(place.device)
    size, needed = largest([found], step_memory(recipe, accelerator))
    return {"images": found, "gb": needed / 1e9, "fits": size == found}


def out_of_memory(place: Place) -> dict[str, Any]:
    """The message names ways out."""
    recipe = recipe_of("clove", place)
    try:
        with memory_explained(recipe, 8, 1, True):
            if not place.on_gpu:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            torch.empty(1 << 45, dtype=torch.uint8, device=place.device)
    except OSError as error:
        if "batch.per_device" not in str(error):
            raise
        return {"message": str(error)}
    raise AssertionError("nothing was raised")


# ---- compiling, in processes beside ----------------------------------------------------------------------------------


def start_compiling(children: Children, place: Place, done: Collection[str], names: Sequence[str]) -> None:
    """In a rehearsal of the first method alone."""
    for method in names:
        name = f"compiled step of {method}"
        if name not in done and (method == "clove" or not place.rehearse):
            children.start(name, compiled, method=method)
    name = "compiled step of clove in full size"
    if "clove" in names and not place.rehearse and name not in done:  # `speed` finds its kernels in the cache then
        children.start(name, compiled_in_full, batch=128)


def compiled(place: Place, method: str) -> dict[str, Any]:
    """The same losses as without compiling; float32, so that only the order of sums differs."""
    found: dict[str, Mapping[str, Any]] = {}
    for kind in ("plain", "compiled"):
        with own_accelerator():
            compiles = kind == "compiled" and not place.rehearse
            train_state = built(method, place, "run.precision=fp32", f"run.compile={str(compiles).lower()}")
            if kind == "compiled" and place.rehearse:  # without a compiler's minutes
                train_state.method.compile(backend="eager")
            began = time.perf_counter()
            found[kind] = {"losses": losses(train_state, place), "seconds": time.perf_counter() - began}
    off = max(abs(a - b) / abs(a) for a, b in zip(*(one["losses"] for one in found.values()), strict=True))
    assert off < (0.05 if method in SHUFFLED else 2e-3), f"compiled losses are off by {off:.3g}: {found}"
    return {"off": off, **found}
