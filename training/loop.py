"""The trainer: one recipe from its first step to its last, on one device or many, for any method.

Read from top to bottom. Everything random is a function of (seed, epoch, image) or (seed, step, process), and
everything that varies is a function of the step, so that a run that was stopped goes on exactly as if it had not been.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import signal
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from clove_hub.backbones import create_backbone
from clove_hub.methods import METHODS
from clove_hub.methods.base import batch_norms
from clove_hub.runs import newest_checkpoint
from clove_hub.views import DeviceViews

from . import checkpoints
from .data import make_loader, steps_per_epoch
from .images import Source, Stream, open_source
from .optimizer import LARS, parameter_groups
from .recipe import Recipe, as_sections, differences
from .reporting import Reporter, check_trackers, configure_logging, flatten
from .schedule import learning_rate, teacher_momentum

log = logging.getLogger(__name__)

FINISHED = 0
STOPPED = 75
"""The exit code after SIGTERM or SIGUSR1: saved, start me again (EX_TEMPFAIL of sysexits.h)."""


def train(recipe: Recipe) -> int:
    """Trains until the recipe's last step or a signal; returns the exit code, FINISHED or STOPPED.

    Raises:
        ValueError: something the user has to mend, found before the first step.
        FloatingPointError: the loss or a gradient was not finite; the weights are still those of the step before.
    """
    # ---- process and precision ---------------------------------------------------------------------------------
    run = Path(recipe.run.output)
    check_trackers(recipe.run.trackers)
    if recipe.run.precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError("run.precision=fp16 needs an accelerator: choose bf16 or fp32 on a CPU")
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # unsaid, Accelerate runs several CPU processes as so many lone ones
        mixed_precision={"fp32": "no"}.get(recipe.run.precision, recipe.run.precision),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        log_with=list(recipe.run.trackers) or None,
        project_dir=run,
    )
    # torch 2.15 deprecates the name for one that torch 2.6 does not have.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    configure_logging(accelerator.is_main_process)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes

    found = newest_checkpoint(run)
    if found and found[1]["finished"]:
        log.info("%s is finished (%d steps); nothing to do", run, found[1]["step"])
        return FINISHED

    # ---- images and steps --------------------------------------------------------------------------------------
    micro_batch, accumulation = divide_batch(recipe.batch.total, recipe.batch.per_device, world)
    source = open_source(recipe.data)
    epoch_steps = steps_per_epoch(source, recipe.batch.total)
    steps = recipe.schedule.steps or round(recipe.schedule.epochs * epoch_steps)
    warmup = round(recipe.schedule.warmup_epochs * epoch_steps)
    if warmup >= steps:
        raise ValueError(
            f"schedule.warmup_epochs={recipe.schedule.warmup_epochs:g} is {warmup} steps, but the run has only {steps}: "
            "lower it or train longer"
        )
    peak = recipe.optimizer.learning_rate * recipe.batch.total / 256

    # ---- method and optimiser ----------------------------------------------------------------------------------
    torch.manual_seed(recipe.run.seed)
    method: Any = METHODS[recipe.method_name].build(create_backbone(recipe.backbone.model), recipe.method)
    if micro_batch < 2 and any(batch_norms(method)):
        raise ValueError(
            f"batch.total={recipe.batch.total} over {world} processes with batch.per_device={recipe.batch.per_device} "
            "gives each process one image at a time, but batch norm needs at least two: raise batch.total or use "
            "fewer processes"
        )
    if world > 1 and device.type != "cpu":  # torch has no synchronised batch norm for the CPU
        method = convert_sync_batchnorm(method)  # type: ignore[no-untyped-call]
    if recipe.run.channels_last:
        method = method.to(memory_format=torch.channels_last)
    method = method.to(device)
    if recipe.run.compile:
        method.compile()
    optimizer: Any = LARS(
        parameter_groups(method, recipe.optimizer.weight_decay),
        lr=peak,
        momentum=recipe.optimizer.momentum,
        trust=recipe.optimizer.trust,
    )
    spec = method.view_spec
    first_view = spec.views[0]
    make_views = DeviceViews(spec).to(device)

    # ---- resume ------------------------------------------------------------------------------------------------
    start = resume(run, found, recipe, source, accelerator, method, optimizer)
    model, prepared = accelerator.prepare(method, optimizer)
    if found and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(found[1]["grad_scaler"])
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        (run / "recipe.yaml").write_text(yaml.safe_dump(as_sections(recipe), sort_keys=False))
        checkpoints.truncate_metrics(run / "metrics.jsonl", start)
    accelerator.init_trackers(run.name, config=flatten(as_sections(recipe)))

    def save(done: int, failed: bool = False) -> Path:
        """What the run is after `done` steps, from the main process while the others wait."""
        folder = run
        if accelerator.is_main_process:
            tensors = {
                "model": method.state_dict(),
                "optimizer": checkpoints.optimizer_tensors(optimizer, method),
            }
            state = {
                "epoch": done // epoch_steps,
                "steps_total": steps,
                "finished": done == steps,
                "images_seen": done * recipe.batch.total,
                "method": recipe.method_name,
                "exported": method.exported,
                "backbone": recipe.backbone.model,
                "data": {"name": source.name, "fingerprint": source.fingerprint, "images": len(source)},
                "preprocessing": {"size": first_view.size, "mean": list(spec.mean), "std": list(spec.std)},
                "versions": versions(),
                "hardware": hardware(device, world),
                "grad_scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "recipe": as_sections(recipe),
            }
            folder = checkpoints.save(run, done, tensors, state, failed=failed)
            checkpoints.prune(run, recipe.run.keep)
        accelerator.wait_for_everyone()
        return folder

    # ---- the loop ----------------------------------------------------------------------------------------------
    loader = make_loader(
        source,
        spec,
        seed=recipe.run.seed,
        global_batch=recipe.batch.total,
        micro_batch=micro_batch,
        rank=rank,
        world=world,
        start_step=start,
        stop_step=steps,
        workers=recipe.data.workers,
        pin_memory=device.type == "cuda",
    )
    log.info(
        "%s: %s on %s, %d images from %s, %d steps of %d (%d process%s x %d x %d), %s",
        run,
        recipe.method_name,
        recipe.backbone.model,
        len(source),
        source.name,
        steps,
        recipe.batch.total,
        world,
        "es" if world > 1 else "",
        micro_batch,
        accumulation,
        f"from step {start}" if start else "from scratch",
    )
    # Signals first: nothing may be lost between the first step and the moment that they are listened to.
    with listen() as asked_to_stop, Reporter(accelerator, run, start, steps, recipe.batch.total) as report:
        batches = iter(loader)
        for step in range(start, steps):
            torch.manual_seed(step_seed(recipe.run.seed, step, rank))
            rate = learning_rate(step, steps, warmup, peak, recipe.schedule.start_factor, recipe.schedule.final_factor)
            for group in optimizer.param_groups:
                group["lr"] = rate
            momentum = teacher_momentum(step, steps, recipe.schedule.teacher_momentum)
            method.refresh_teacher(momentum)

            # Forward and backward, the gradients synchronised with the last micro-batch alone.
            losses, logs = [], []
            for micro in range(accumulation):
                waiting = time.perf_counter()
                batch = next(batches)
                report.waited += time.perf_counter() - waiting
                report.broken_images(batch.broken)
                views = make_views(batch.crops.to(device, non_blocking=True))
                last = micro == accumulation - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    loss, micro_logs = model(views)
                    accelerator.backward(loss / accumulation)
                losses.append(loss.detach())
                logs.append(micro_logs)

            # The one moment in a step when the host waits for the device and for the other processes.
            accelerator.unscale_gradients(prepared)
            gradients = [p.grad for p in method.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            mine = torch.stack([torch.stack(losses).mean(), norm, norm.new_tensor(float(asked_to_stop()))])
            loss_value, norm_value, stop = accelerator.reduce(mine, "mean").tolist()

            if not finite(loss_value) or not (finite(norm_value) or scaler_may_skip(accelerator)):
                folder = save(step, failed=True)
                raise FloatingPointError(
                    f"step {step + 1}: the loss is {loss_value} and the gradient's norm {norm_value}; the optimiser has not "
                    f"stepped. The state is in {folder}, for looking at; starting the run again goes on from its last "
                    "regular checkpoint. Lower optimizer.learning_rate, lengthen schedule.warmup_epochs, or use "
                    "run.precision=fp32"
                )
            prepared.step()
            prepared.zero_grad()

            done = step + 1
            report.advance()
            if done % recipe.run.log_every == 0 or done in (1, steps):
                names = sorted(logs[0])
                mean = torch.stack([torch.stack([entry[name] for name in names]) for entry in logs]).mean(0)
                values = dict(zip(names, accelerator.reduce(mean, "mean").tolist(), strict=True))
                schedule = {"epoch": done / epoch_steps, "learning_rate": rate, "teacher_momentum": momentum}
                report.row(done, {"loss": loss_value, "gradient_norm": norm_value, **schedule, **values})
            if stop or done == steps or done % recipe.run.save_every == 0:
                report.sync()
                save(done)
            if stop and done < steps:
                log.info("asked to stop: saved after step %d; start the run again to go on", done)
                return STOPPED

    log.info("finished after %d steps. Next: clove-hub export %s", steps, run)
    return FINISHED


# ---- pieces ----------------------------------------------------------------------------------------------------------


def divide_batch(total: int, per_device: int, world: int) -> tuple[int, int]:
    """Images in one forward pass of a process, and how many passes make a step.

    Raises:
        ValueError: the global batch does not divide.
    """
    if total % world:
        near = [total // world * world, (total // world + 1) * world]
        raise ValueError(
            f"batch.total={total} does not divide among {world} processes: choose {near[1]}"
            + (f" or {near[0]}" if near[0] else "")
            + ", or another number of processes"
        )
    share = total // world
    micro = min(per_device, share)
    if share % micro:
        fitting = max(d for d in range(1, micro + 1) if share % d == 0)
        raise ValueError(
            f"batch.total={total} over {world} processes is {share} images for each, which batch.per_device={per_device} "
            f"does not divide: choose batch.per_device={fitting}"
        )
    return micro, share // micro


def resume(
    run: Path,
    found: tuple[Path, dict[str, Any]] | None,
    recipe: Recipe,
    source: Source | Stream,
    accelerator: Accelerator,
    method: nn.Module,
    optimizer: LARS,
) -> int:
    """Brings method and optimiser to where the checkpoint left them; returns the steps done.

    Raises:
        ValueError: the checkpoint is of another recipe or other images.
    """
    if found is None:
        return 0
    folder, state = found
    changed = differences(state["recipe"], as_sections(recipe))
    if state["data"]["fingerprint"] != source.fingerprint:
        old = state["data"]
        changed.append(f"the images: {old['images']} in {old['name']} -> {len(source)} in {source.name}, not the same")
    if changed:
        raise ValueError(
            f"{run} holds a run with other settings ({'; '.join(changed)}): "
            "start with the old ones to go on, or choose another run.output"
        )
    method.load_state_dict(checkpoints.read_tensors(folder, "model"))
    checkpoints.restore_optimizer(optimizer, method, checkpoints.read_tensors(folder, "optimizer"))
    step: int = state["step"]
    log.info("resuming from %s", folder)
    return step


@contextlib.contextmanager
def listen() -> Iterator[Any]:
    """Within the context SIGTERM and SIGUSR1 are remembered instead of obeyed; yields a function that tells."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of everything random in a step that is not about an image, such as stochastic depth."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def finite(value: float) -> bool:
    return value - value == 0


def scaler_may_skip(accelerator: Accelerator) -> bool:
    """float16's scaler steps over an overflow and lowers its scale; below 1 it is no longer the scale's fault."""
    return accelerator.scaler is not None and accelerator.scaler.get_scale() >= 1


def versions() -> dict[str, str]:
    packages = ("clove-hub", "torch", "timm", "accelerate", "safetensors", "numpy", "pillow")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def hardware(device: torch.device, world: int) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{world} x {name} ({device.type})"
