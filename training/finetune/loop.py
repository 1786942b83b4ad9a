"""Fine-tuning from the first step to the last, on one device or many, for any task.

Images, learning rate and random numbers are functions of the seed and the step, so that an interrupted run
continues as if it had not been; on a CPU bit for bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from clove_hub.runs import METRICS

from ..run.folder import RunFolder
from ..run.loader import open_loader
from ..run.peers import TROUBLE, PeerFailed
from ..run.progress import Progress, redraw_interval
from ..run.rescue import Undo, untrained
from ..run.sampler import StepSampler, divide_batch, step_seed
from ..run.stopping import FINISHED, Stop, until_stopped
from .average import Averaged
from .best import Best, share_buffers
from .dataset import DetectionDataset, OrderByKind, Sample, SegmentationDataset, Target
from .schedule import LEAST_WARMUP, Plan, learning_rate
from .settings import FinetuneSettings

log = logging.getLogger(__name__)

NORMS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True)
class Job:
    """A training: settings, data and folder."""

    folder: RunFolder
    settings: FinetuneSettings
    plan: Plan
    dataset: DetectionDataset | SegmentationDataset
    facts: Mapping[str, Any]
    """Plain data in each checkpoint that identifies the run."""
    metric: str
    """The figure that decides which network is best."""
    score: Callable[[nn.Module], Mapping[str, float]]
    """The figures of a network in eval mode."""


def train(job: Job, network: nn.Module, accelerator: Accelerator, asked_to_stop: Stop) -> int:
    """Train until the last step or a stop request, resuming from the run's folder; return the exit code.

    Args:
        network: network with the backbone's weights; it is modified.
        asked_to_stop: the requested exit code, or 0.

    Raises:
        FloatingPointError: a non-finite loss or gradient; the newest checkpoint is from before.
        OSError: a file of the run cannot be written, a data-loading worker or another process of the run has ended.
    """
    settings, plan, folder, peers = job.settings, job.plan, job.folder, job.folder.peers
    network.to(accelerator.device).train()
    ema = settings.optimizer.ema
    averaged = Averaged(network, ema) if ema else None
    whole: nn.Module = averaged or network  # what a checkpoint contains
    optimizer = make_optimizer(network, settings)
    start = done = folder.restore(whole, optimizer)
    undo = Undo(untrained(network))
    model, prepared = accelerator.prepare(network, optimizer)
    scaler = accelerator.scaler  # for float16's loss
    if folder.found and scaler is not None and (left := folder.found[1]["grad_scaler"]):
        scaler.load_state_dict(left)
    loader = batches(job, accelerator, start, plan.steps)
    folder.truncate(METRICS, start)
    best = Best(folder, plan.evaluate, plan.steps, start, job.metric, job.score) if plan.evaluate else None

    def state() -> dict[str, Any]:
        return {**job.facts, "grad_scaler": scaler.state_dict() if scaler is not None else None}

    def save(step: int) -> None:
        folder.save(step, whole, optimizer, state())

    def evaluate(step: int) -> None:
        """Score the network after this step, if due, after its checkpoint was saved."""
        if best and best.due(step):
            save(step)
            with progress.paused():
                best.consider(step, (averaged.average if averaged else network).eval())
            network.train()

    def rescue() -> None:
        """Save the state after a failure, in the main process only."""
        if done > start:
            folder.write(done, whole, optimizer, state())

    with Progress(peers.main, start, plan.steps) as progress, folder.rescuing(undo, rescue):
        for step in range(start, plan.steps):
            # A process without images takes no part in the step; the others would wait for it.
            code, trouble, samples = asked_to_stop(), None, []
            if not code:
                try:
                    samples = next(loader)
                except (ValueError, OSError) as error:
                    code, trouble = TROUBLE, error
            if code := peers.highest(code):
                if step:
                    save(step)
                if code == TROUBLE:
                    raise trouble or PeerFailed("another process has no images for the next step; see its own error")
                log.info("asked to stop: saved after step %d; start the run again to resume", step)
                return code

            evaluate(step)
            torch.manual_seed(step_seed(settings.run.seed, step, peers.rank))
            rate = learning_rate(step, plan)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with undo.step():
                losses: dict[str, Tensor] = model(*on_device(samples, accelerator.device))
                loss = torch.stack(list(losses.values())).sum()
                prepared.zero_grad()
                accelerator.backward(loss)
                accelerator.unscale_gradients(prepared)
                norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
                # Detectors synchronize host and device in every step anyway, for the number of boxes.
                value, gradient = accelerator.reduce(torch.stack([loss.detach(), norm]), "mean").tolist()
                # A step whose gradient overflows in float16 is skipped, and the loss scale is lowered.
                over = scaler is not None and scaler.get_scale() >= 1
                if not (math.isfinite(value) and (math.isfinite(gradient) or over)):
                    raise FloatingPointError(diverged(step, value, gradient, losses, job, folder.saved))
                if settings.optimizer.clip_norm and settings.optimizer.clip_norm < gradient < math.inf:
                    torch.nn.utils.clip_grads_with_norm_(network.parameters(), settings.optimizer.clip_norm, norm)
                with undo.update():
                    prepared.step()
                    if averaged:
                        averaged.update(step)
            done = step + 1
            progress.bar.update()
            if done % settings.run.log_every == 0 or done in (1, plan.steps):
                steps, seconds = progress.lap(done)
                speed = steps * settings.batch.total / seconds
                own = {
                    name: part.item() for name, part in losses.items()
                }  # of this process; the loss is that of all processes
                row = {"step": done, "loss": value, **own, "gradient_norm": gradient}
                folder.append(METRICS, row | {"learning_rate": rate, "images_per_second": speed})
                progress.show({"loss": f"{value:.3f}", "images/s": f"{speed:.1f}"})
            if done == plan.steps or done % settings.run.save_every == 0:
                save(done)
        evaluate(plan.steps)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # from here on the network computes in float32
    if averaged:
        network.load_state_dict(averaged.average.state_dict())
    share_buffers(network)
    if best:
        best.restore(network)
    return FINISHED


def diverged(step: int, loss: float, norm: float, losses: Mapping[str, Tensor], job: Job, saved: int | None) -> str:
    """The message about a non-finite step, and how to continue."""
    parts = ", ".join(f"{name.removeprefix('loss_')} {part.item():.4g}" for name, part in losses.items())
    back = f"resumes from step {saved}" if saved else "starts from the beginning"
    optimizer, precision, warmup = job.settings.optimizer, job.settings.run.precision, job.plan.warmup
    ways = [f"a lower optimizer.learning_rate (now {optimizer.learning_rate:g})"]
    if step < 2 * max(warmup, LEAST_WARMUP):
        ways.append(f"more schedule.warmup_steps (now {warmup})")
    limit = optimizer.clip_norm
    ways.append(f"a lower optimizer.clip_norm (now {limit:g})" if limit else "optimizer.clip_norm=35")
    if precision != "fp32":
        ways.append("run.precision=fp32")
    return (
        f"step {step + 1}: the loss is {loss} ({parts}) and the gradient's norm {norm}; the optimizer has not stepped. The "
        f"same command {back} and fails here again. To continue, add run.amend=true with {', '.join(ways[:-1])} or {ways[-1]}"
    )


def make_precise(job: Job, network: nn.Module, accelerator: Accelerator, asked_to_stop: Stop) -> None:
    """Recompute batch-norm statistics as the mean over the batches of the next `run.precise_bn` steps.

    The running statistics of training are those of earlier weights (Wu and Johnson 2021, section 3; Detectron2's
    PRECISE_BN).

    Raises:
        SystemExit: as `until_stopped`.
    """
    settings, count = job.settings, job.settings.run.precise_bn
    network.train()
    norms = [module for module in network.modules() if isinstance(module, NORMS) and module.training]  # not the frozen
    before = [(norm, norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch then takes the mean of all batches
    loader = batches(job, accelerator, job.plan.steps, job.plan.steps + count)
    with torch.no_grad():
        shown = until_stopped(bar(loader, "batch norm", accelerator, count), asked_to_stop)
        for step, samples in enumerate(shown, start=job.plan.steps):
            torch.manual_seed(step_seed(settings.run.seed, step, accelerator.process_index))
            network(*on_device(samples, accelerator.device))
    for norm, momentum in before:
        norm.momentum = momentum
        for statistic in (norm.running_mean, norm.running_var):
            assert statistic is not None
            statistic.copy_(accelerator.reduce(statistic, "mean"))  # each process has its own images


# ---- pieces ----------------------------------------------------------------------------------------------------------


def make_optimizer(network: nn.Module, settings: FinetuneSettings) -> torch.optim.Optimizer:
    """SGD with momentum, Adam or AdamW; norms have no weight decay unless set."""
    norms = [m for m in network.modules() if isinstance(m, (*NORMS, nn.GroupNorm, nn.LayerNorm))]
    free = {id(parameter) for norm in norms for parameter in norm.parameters(recurse=False)}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    chosen = settings.optimizer
    groups = [
        {"params": [p for p in trained if id(p) not in free], "weight_decay": chosen.weight_decay},
        {"params": [p for p in trained if id(p) in free], "weight_decay": chosen.weight_decay * chosen.decay_all},
    ]
    # The learning rate is set in each step.
    if chosen.name != "sgd":
        return (torch.optim.AdamW if chosen.name == "adamw" else torch.optim.Adam)(groups, lr=0.0, fused=True)
    return torch.optim.SGD(groups, lr=0.0, momentum=chosen.momentum, fused=True)


def batches(job: Job, accelerator: Accelerator, start: int, stop: int) -> Iterator[list[Sample]]:
    """This process's samples for each step starting at `start`.

    Raises:
        ValueError: the batch is not divisible; or, while iterating, an image cannot be read or does not match its
            annotations.
    """
    settings, world = job.settings, accelerator.num_processes
    micro, _ = divide_batch(settings.batch.total, settings.batch.total, world)
    order = OrderByKind(job.dataset.kinds, settings.batch.total, settings.run.seed, settings.schedule.by_epoch)
    sampler = StepSampler(order, settings.batch.total, micro, accelerator.process_index, world, start, stop)
    workers = min(settings.data.workers, max(stop - start, 1))
    return open_loader(job.dataset, sampler, workers, minutes=settings.run.timeout)


def on_device(samples: Sequence[Sample], device: torch.device) -> tuple[list[Tensor], list[Target]]:
    """Images with values from 0 to 1, and targets, in the format of torchvision's models."""
    images = [sample.image.to(device).float() / 255 for sample in samples]
    return images, [{key: value.to(device) for key, value in sample.target.items()} for sample in samples]


def bar(items: Any, name: str, accelerator: Accelerator, total: int | None = None) -> Any:
    """The items, with a progress bar on the main process."""
    return tqdm(items, name, total, disable=not accelerator.is_main_process, leave=False, mininterval=redraw_interval())
