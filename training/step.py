"""One optimizer step, from images in host memory to the next weights. The loop and the benchmarks run this code.

On an accelerator nothing in a step waits for the device: whether loss and gradient are finite is decided there, by a
flag that keeps the optimizer from moving the weights ever again once it has fallen, and the host looks at the flag when
it looks at the loss. On a CPU, where looking costs nothing, it looks at every step.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor
from torch.profiler import record_function

from clove_hub.backbones import create_backbone
from clove_hub.methods import METHODS
from clove_hub.methods.base import Logs
from clove_hub.views import CropBatch, DeviceViews

from .data import LoadedBatch
from .optimizer import LARS, parameter_groups
from .recipe import Recipe


@dataclass
class Learner:
    """A method on its device, with what moves its weights."""

    accelerator: Accelerator
    method: Any
    """The method itself, and ..."""
    model: Any
    """... wrapped for mixed precision and several processes."""
    optimizer: LARS
    """The optimizer itself, and ..."""
    prepared: Any
    """... wrapped for float16's scaler."""
    make_views: DeviceViews
    deferred: bool
    """Whether finiteness is acted upon by the device, the host looking later; or by the host, at every step."""
    finite: Tensor = field(init=False)
    """Boolean scalar: whether the loss and gradient of every step so far were finite."""
    steps: Tensor = field(init=False)
    """Integer scalar: how many steps so far were."""
    figures: Tensor = field(init=False)
    """(2,): loss and gradient norm of the last step, or of the first that was not finite."""

    def __post_init__(self) -> None:
        device = self.accelerator.device
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.steps = torch.zeros((), dtype=torch.long, device=device)
        self.figures = torch.zeros(2, device=device)


def assemble(recipe: Recipe, accelerator: Accelerator) -> Learner:
    """Builds method and optimizer, the same on every process, not yet wrapped (see `prepare`).

    Raises:
        ValueError: the recipe's method or backbone cannot be built.
    """
    torch.manual_seed(recipe.run.seed)
    method: Any = METHODS[recipe.method_name].build(create_backbone(recipe.backbone.model), recipe.method)
    # torch has no synchronized batch norm for the CPU
    if method.synchronized and accelerator.num_processes > 1 and accelerator.device.type != "cpu":
        method = convert_sync_batchnorm(method)  # type: ignore[no-untyped-call]
    if recipe.run.channels_last:
        method = method.to(memory_format=torch.channels_last)
    method = method.to(accelerator.device)
    if recipe.run.compile:
        method.compile()
    optimizer = LARS(
        parameter_groups(
            method,
            recipe.optimizer.weight_decay,
            adapt=recipe.optimizer.name == "lars",
            decay_all=recipe.optimizer.decay_all,
        ),
        lr=0.0,  # every step brings its own
        momentum=recipe.optimizer.momentum,
        trust=recipe.optimizer.trust,
    )
    make_views = DeviceViews(method.view_spec).to(accelerator.device)
    deferred = accelerator.device.type != "cpu"
    return Learner(accelerator, method, method, optimizer, optimizer, make_views, deferred)


def prepare(learner: Learner) -> None:
    """Wraps method and optimizer, once their state is what it shall be."""
    with warnings.catch_warnings():
        # torch 2.15 deprecates the name for one that torch 2.6 does not have.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        learner.model, learner.prepared = learner.accelerator.prepare(learner.method, learner.optimizer)


def take_step(
    learner: Learner,
    batches: Iterable[CropBatch],
    accumulation: int,
    rate: float,
    momentum: float,
    epoch: float,
) -> Logs:
    """Forward, backward and update for the next `accumulation` micro-batches, which lie on the device.

    Args:
        rate: the learning rate of this step.
        momentum: the teacher's.
        epoch: passes over the images before this step.

    Returns:
        The method's logs, the mean over micro-batches, of this process alone.
    """
    accelerator = learner.accelerator
    learner.method.begin_step(momentum, epoch)
    losses, logs = [], []
    for micro, crops in enumerate(batches):
        with record_function("views"):
            views = learner.make_views(crops)
        # Gradients are synchronized with the last micro-batch alone.
        with contextlib.nullcontext() if micro == accumulation - 1 else accelerator.no_sync(learner.model):
            loss, micro_logs = learner.model(views)
            with record_function("backward"):
                accelerator.backward(loss / accumulation)
        losses.append(loss.detach())
        logs.append(micro_logs)
    assert len(losses) == accumulation

    with record_function("optimizer"):
        accelerator.unscale_gradients(learner.prepared)
        norm = torch.nn.utils.get_total_norm([p.grad for p in learner.method.parameters() if p.grad is not None])
        watch(learner, torch.stack([torch.stack(losses).mean().to(norm.dtype), norm]))
        for group in learner.optimizer.param_groups:
            group["lr"] = rate
        if learner.deferred:
            learner.optimizer.gate = learner.finite
        if learner.deferred or learner.finite:
            learner.prepared.step()
        learner.prepared.zero_grad()
    return {name: torch.stack([entry[name] for entry in logs]).mean() for name in logs[0]}


def watch(learner: Learner, figures: Tensor) -> None:
    """Takes in the loss and the gradient norm of a step; the mean over processes, which the norm is already."""
    figures = learner.accelerator.reduce(figures, "mean")
    finite = figures.isfinite()
    # float16's scaler steps over gradients that overflow, and lowers its scale.
    healthy = finite[0] if learner.accelerator.scaler is not None else finite.all()
    learner.figures = torch.where(learner.finite, figures.float(), learner.figures)
    learner.finite = learner.finite & healthy
    learner.steps = learner.steps + learner.finite


def on_device(batches: Iterable[LoadedBatch], device: torch.device) -> Iterator[LoadedBatch]:
    """The batches with their crops on the device; on CUDA each is copied while the one before is worked on."""
    if device.type != "cuda":
        for batch in batches:
            yield moved(batch, device)
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: LoadedBatch | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            ready, waiting = waiting, moved(batch, device)
        if ready is not None:
            yield ready
        # Whatever is done with it from here on comes after its copy, and its memory is not used again before.
        torch.cuda.current_stream(device).wait_stream(copying)
        for tensor in (*waiting.crops.crops, *waiting.crops.boxes, *waiting.crops.flipped):
            tensor.record_stream(torch.cuda.current_stream(device))
    if waiting is not None:
        yield waiting


def moved(batch: LoadedBatch, device: torch.device) -> LoadedBatch:
    """The batch with its crops on the device; copied in the background where the memory is pinned."""
    return replace(batch, crops=batch.crops.to(device, non_blocking=True))
