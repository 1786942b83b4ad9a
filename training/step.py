"""One optimizer step, from images in host memory to the updated weights. The loop and the benchmarks run this code.

On an accelerator a step has no host-device synchronization: the device checks that loss and gradient are finite, and a
flag keeps the optimizer from changing the weights after the first non-finite value; the host reads the flag together
with the loss. On a CPU, where reading is free, it does so in every step.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import record_function

from clove_hub.batch_norm import settle_statistics
from clove_hub.methods import build_method
from clove_hub.methods.base import Logs
from clove_hub.views import CropBatch, DeviceViews, ViewSpec, for_bands
from clove_hub.weights import Preprocessing

from .data import LoadedBatch
from .optimizer import LARS, make_optimizer, set_rates
from .recipe import Recipe
from .run.rescue import Undo, untrained

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """A method on its device, with its optimizer."""

    accelerator: Accelerator
    method: Any
    """The unwrapped method."""
    model: Any
    """The method wrapped for mixed precision and data parallelism."""
    optimizer: Optimizer
    """The unwrapped optimizer."""
    prepared: Any
    """The optimizer wrapped for float16's scaler."""
    undo: Undo
    """Restores the method if a step fails."""
    deferred: bool
    """Whether the device acts on non-finite values and the host reads the flag later; otherwise the host checks every
    step, as with optimizers that have no gate."""
    clip_norm: float | None = None
    """Maximum norm of the gradient."""
    make_views: DeviceViews = field(init=False)
    finite: Tensor = field(init=False)
    """Boolean scalar: whether the loss and gradient of every step so far were finite."""
    steps: Tensor = field(init=False)
    """Integer scalar: number of finite steps so far."""
    figures: Tensor = field(init=False)
    """(2,): loss and gradient norm of the last step, or of the first non-finite one."""

    def __post_init__(self) -> None:
        device = self.accelerator.device
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.steps = torch.zeros((), dtype=torch.long, device=device)
        self.figures = torch.zeros(2, device=device)
        self.make_views = DeviceViews(self.method.view_spec).to(device)


def assemble(recipe: Recipe, accelerator: Accelerator) -> TrainState:
    """Build method and optimizer, identical on every process, not yet wrapped (see `prepare`).

    Raises:
        ValueError: the recipe's method or backbone cannot be built.
    """
    torch.manual_seed(recipe.run.seed)
    method = build_method(recipe.method_name, recipe.method, recipe.backbone)
    if recipe.run.channels_last:
        method = method.to(memory_format=torch.channels_last)
    method = method.to(accelerator.device)
    if recipe.run.compile:
        method.compile()
    optimizer = make_optimizer(method, recipe.optimizer, {"student.backbone.": method.student["backbone"]})
    deferred = accelerator.device.type != "cpu" and isinstance(optimizer, LARS)
    undo = Undo(untrained(method))
    clip = recipe.optimizer.clip_norm
    return TrainState(accelerator, method, method, optimizer, optimizer, undo, deferred, clip)


def normalize(train_state: TrainState, images: Preprocessing) -> ViewSpec:
    """Set the bands and the normalization of the method's images; return its views."""
    method = train_state.method
    method.view_spec, without = for_bands(method.view_spec, images.mean, images.std, images.depth)
    if without:
        log.info(
            "data.bands=%d with %d bits: the views leave out %s, which have no meaning there",
            *(len(images.mean), images.depth, ", ".join(without)),
        )
    train_state.make_views = DeviceViews(method.view_spec).to(train_state.accelerator.device)
    spec: ViewSpec = method.view_spec
    return spec


def prepare(train_state: TrainState) -> None:
    """Wrap method and optimizer, after their state has been restored."""
    with warnings.catch_warnings():
        # torch 2.15 deprecates the name in favor of one that torch 2.6 does not have.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        model, optimizer = train_state.accelerator.prepare(train_state.method, train_state.optimizer)
    train_state.model, train_state.prepared = model, optimizer


def take_step(
    train_state: TrainState,
    batches: Iterable[CropBatch],
    accumulation: int,
    rate: float,
    momentum: float,
    epoch: float,
    weight_decay: float | None = None,
) -> Logs:
    """Forward, backward and update for the next `accumulation` micro-batches, which are on the device.

    Args:
        rate: the learning rate of this step.
        momentum: the teacher's momentum.
        epoch: passes over the images before this step.
        weight_decay: weight decay of this step, if it varies.

    Returns:
        The method's logs, averaged over micro-batches, of this process only.
    """
    with train_state.undo.step():
        # Before the first pass, so that the passes of an accumulated step equal one large batch.
        train_state.method.begin_step(momentum, epoch)
        losses, logs = passes(train_state, batches, accumulation)
        settle_statistics(train_state.method, accumulation)
        train_state.accelerator.unscale_gradients(train_state.prepared)
        with record_function("optimizer"):
            trained = [p.grad for p in train_state.method.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(trained)
            watch(train_state, torch.stack([torch.stack(losses).mean().to(norm.dtype), norm]))
            if train_state.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(train_state.method.parameters(), train_state.clip_norm, norm)
            set_rates(train_state.optimizer, rate, weight_decay)
            if isinstance(train_state.optimizer, LARS) and train_state.deferred:
                train_state.optimizer.gate = train_state.finite
            with train_state.undo.update():
                if train_state.deferred or train_state.finite:
                    train_state.prepared.step()
                train_state.prepared.zero_grad()
    return {name: torch.stack([entry[name] for entry in logs]).mean() for name in logs[0]}


def passes(train_state: TrainState, batches: Iterable[CropBatch], accumulation: int) -> tuple[list[Tensor], list[Logs]]:
    """Forward and backward for each micro-batch; return the losses and the method's logs."""
    accelerator = train_state.accelerator
    losses, logs = [], []
    for micro, crops in enumerate(batches):
        with record_function("views"):
            views = train_state.make_views(crops)
        # Gradients are synchronized only with the last micro-batch.
        with contextlib.nullcontext() if micro == accumulation - 1 else accelerator.no_sync(train_state.model):
            loss, micro_logs = train_state.model(views)
            with record_function("backward"):
                accelerator.backward(loss / accumulation)
        losses.append(loss.detach())
        logs.append(micro_logs)
    assert len(losses) == accumulation
    return losses, logs


def watch(train_state: TrainState, figures: Tensor) -> None:
    """Record the loss and the gradient norm of a step, averaged over processes, which the norm already is."""
    figures = train_state.accelerator.reduce(figures, "mean")
    finite = figures.isfinite()
    # float16's scaler skips steps with overflowing gradients, and lowers its scale.
    healthy = finite[0] if train_state.accelerator.scaler is not None else finite.all()
    train_state.figures = torch.where(train_state.finite, figures.float(), train_state.figures)
    train_state.finite = train_state.finite & healthy
    train_state.steps = train_state.steps + train_state.finite


def on_device(batches: Iterable[LoadedBatch], device: torch.device) -> Iterator[LoadedBatch]:
    """The batches with their crops on the device; on CUDA each is copied while the previous one is processed."""
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
        # All later work on it waits for its copy, and its memory is not reused before.
        torch.cuda.current_stream(device).wait_stream(copying)
        for tensor in (*waiting.crops.crops, *waiting.crops.boxes, *waiting.crops.flipped):
            tensor.record_stream(torch.cuda.current_stream(device))
    if waiting is not None:
        yield waiting


def moved(batch: LoadedBatch, device: torch.device) -> LoadedBatch:
    """The batch with its crops on the device; copied asynchronously if the memory is pinned."""
    return replace(batch, crops=batch.crops.to(device, non_blocking=True))
