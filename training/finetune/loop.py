"""Fine-tuning from the first step to the last, on one device or many, for any task.

Images, learning rate and random numbers are functions of the seed and the step, so that an interrupted run
continues as if it had not been; on a CPU bit for bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..run import checkpoints
from ..run.loader import open_loader
from ..run.progress import Progress, redraw_interval, truncate_rows
from ..run.sampler import StepSampler, divide_batch, step_seed
from ..run.stopping import listen
from .dataset import DetectionDataset, OrderByKind, Sample, SegmentationDataset, Target
from .schedule import Plan, learning_rate
from .settings import FinetuneSettings

log = logging.getLogger(__name__)

NORMS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and where it is kept."""

    run: Path
    settings: FinetuneSettings
    plan: Plan
    dataset: DetectionDataset | SegmentationDataset
    facts: Mapping[str, Any]
    """Plain data in each checkpoint that identifies the run."""


def train(job: Job, network: nn.Module, accelerator: Accelerator, resume: tuple[Path, int] | None) -> bool:
    """Trains until the last step or a signal.

    Args:
        network: with the backbone in its place; it is changed.
        resume: the checkpoint to resume from, and its step.

    Returns:
        Whether the last step was reached.

    Raises:
        FloatingPointError: the loss was not finite; the newest checkpoint is from before.
    """
    settings, plan, run = job.settings, job.plan, job.run
    network.to(accelerator.device).train()
    optimizer = make_optimizer(network, settings)
    start = 0
    if resume is not None:
        folder, start = resume
        checkpoints.restore(folder, network, optimizer)
        log.info("resuming from %s", folder)
    model, prepared = accelerator.prepare(network, optimizer)
    loader = batches(job, accelerator, start, plan.steps)
    if accelerator.is_main_process:
        truncate_rows(run / "metrics.jsonl", start)

    with (
        listen(accelerator.num_processes) as asked_to_stop,
        Progress(run, accelerator.is_main_process, start, plan.steps) as progress,
    ):
        for step, samples in enumerate(loader, start=start):
            torch.manual_seed(step_seed(settings.run.seed, step, accelerator.process_index))
            rate = learning_rate(step, plan)
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses: dict[str, Tensor] = model(*on_device(samples, accelerator.device))
            loss = torch.stack(list(losses.values())).sum()
            prepared.zero_grad()
            accelerator.backward(loss)
            # Detectors synchronize with the device in every step anyway, for the number of boxes.
            if not math.isfinite(value := float(accelerator.reduce(loss.detach(), "mean"))):
                parts = ", ".join(f"{name.removeprefix('loss_')} {part.item():.4g}" for name, part in losses.items())
                raise FloatingPointError(
                    f"step {step + 1}: the loss is {value} ({parts}); the optimizer has not stepped. Starting "
                    "the run again resumes from its newest checkpoint. Lower optimizer.learning_rate or lengthen "
                    "schedule.warmup_steps, with another --out"
                )
            prepared.step()
            done = step + 1
            stop = asked_to_stop()
            progress.bar.update()
            if done % settings.run.log_every == 0 or done in (1, plan.steps):
                steps, seconds = progress.lap(done)
                speed = steps * settings.batch.total / seconds
                own = {
                    name: part.item() for name, part in losses.items()
                }  # of this process; the loss is all processes'
                row = {"step": done, "loss": value, **own, "learning_rate": rate, "images_per_second": speed}
                progress.write(row)
                progress.show({"loss": f"{value:.3f}", "images/s": f"{speed:.1f}"})
            if stop or done == plan.steps or done % settings.run.save_every == 0:
                progress.sync()
                checkpoints.save(accelerator, run, done, network, optimizer, job.facts, settings.run.keep)
            if stop and done < plan.steps:
                log.info("asked to stop: saved after step %d; start the run again to resume", done)
                return False
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # from here on the network computes in float32
    for buffer in network.buffers():  # without synchronized batch norm each process has statistics of its own
        buffer.copy_(broadcast(buffer))
    return True


def make_precise(job: Job, network: nn.Module, accelerator: Accelerator) -> None:
    """Recomputes the statistics of batch norm as the mean over the batches of the next `run.precise_bn` steps.

    The running statistics of training are those of earlier weights (Wu and Johnson 2021, section 3; Detectron2's
    PRECISE_BN).
    """
    settings, count = job.settings, job.settings.run.precise_bn
    norms = [module for module in network.modules() if isinstance(module, NORMS)]
    before = [(norm, norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch then takes the mean of all batches
    network.train()
    loader = batches(job, accelerator, job.plan.steps, job.plan.steps + count)
    with torch.no_grad():
        for step, samples in enumerate(bar(loader, "batch norm", accelerator, count), start=job.plan.steps):
            torch.manual_seed(step_seed(settings.run.seed, step, accelerator.process_index))
            network(*on_device(samples, accelerator.device))
    for norm, momentum in before:
        norm.momentum = momentum
        for statistic in (norm.running_mean, norm.running_var):
            assert statistic is not None
            statistic.copy_(accelerator.reduce(statistic, "mean"))  # each process has seen its own images


# ---- pieces ----------------------------------------------------------------------------------------------------------


def make_optimizer(network: nn.Module, settings: FinetuneSettings) -> torch.optim.Optimizer:
    """SGD with momentum, or Adam; norms do not decay unless they are to."""
    norms = [m for m in network.modules() if isinstance(m, (*NORMS, nn.GroupNorm, nn.LayerNorm))]
    free = {id(parameter) for norm in norms for parameter in norm.parameters(recurse=False)}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    chosen = settings.optimizer
    groups = [
        {"params": [p for p in trained if id(p) not in free], "weight_decay": chosen.weight_decay},
        {"params": [p for p in trained if id(p) in free], "weight_decay": chosen.weight_decay * chosen.decay_all},
    ]
    # The learning rate is set in each step.
    if chosen.name == "adam":
        return torch.optim.Adam(groups, lr=0.0)
    return torch.optim.SGD(groups, lr=0.0, momentum=chosen.momentum)


def batches(job: Job, accelerator: Accelerator, start: int, stop: int) -> Iterator[list[Sample]]:
    """This process's samples for each step from `start` on.

    Raises:
        ValueError: the batch does not divide; or, while iterating, an image cannot be read or is not what its
            annotations say.
    """
    settings, world = job.settings, accelerator.num_processes
    micro, _ = divide_batch(settings.batch.total, settings.batch.total, world)
    order = OrderByKind(job.dataset.kinds, settings.batch.total, settings.run.seed)
    sampler = StepSampler(order, settings.batch.total, micro, accelerator.process_index, world, start, stop)
    return open_loader(job.dataset, sampler, min(settings.data.workers, max(stop - start, 1)))


def on_device(samples: Sequence[Sample], device: torch.device) -> tuple[list[Tensor], list[Target]]:
    """Images with values from 0 to 1, and targets, as torchvision's models take them."""
    images = [sample.image.to(device).float() / 255 for sample in samples]
    return images, [{key: value.to(device) for key, value in sample.target.items()} for sample in samples]


def bar(items: Any, name: str, accelerator: Accelerator, total: int | None = None) -> Any:
    """The items, counted on the main process's screen."""
    return tqdm(items, name, total, disable=not accelerator.is_main_process, leave=False, mininterval=redraw_interval())
