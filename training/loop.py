"""The trainer: one recipe from its first step to its last, on one device or many, for any method.

Read from top to bottom. Everything random is a function of (seed, epoch, image) or (seed, step, process), and
everything that varies is a function of the step, so that an interrupted run continues exactly as if it had not been.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import platform
import shlex
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from accelerate import DistributedDataParallelKwargs
from torch import nn

from clove_hub.methods.base import batch_norms
from clove_hub.runs import STATE, another_run, newest_checkpoint
from clove_hub.settings import flat
from clove_hub.weights import Preprocessing, load_method
from clove_hub.zoo.tensors import require_names_and_shapes

from . import evaluating
from .data import make_loader, steps_per_epoch
from .recipe import Evaluation, Recipe, as_sections, differences
from .reporting import Reporter, check_trackers
from .run import checkpoints
from .run.device import make_accelerator
from .run.progress import truncate_rows
from .run.sampler import divide_batch, step_seed
from .run.stopping import FINISHED, STOPPED, StopRequests, never
from .sources import open_source
from .step import TrainState, assemble, on_device, prepare, take_step

log = logging.getLogger(__name__)


def train(recipe: Recipe, stop_requests: StopRequests = never) -> int:
    """Trains until the recipe's last step or a stop request; returns the exit code, FINISHED or STOPPED.

    Args:
        stop_requests: `listen` where signals ask a run to stop, as they do for a command.

    Raises:
        ValueError: wrong input, found before the first step.
        FloatingPointError: the loss or a gradient was not finite; the weights are still those of the step before.
    """
    # ---- process and precision ---------------------------------------------------------------------------------
    run = Path(recipe.run.output)
    check_trackers(recipe.run.trackers)
    evaluating.check(recipe.evaluate)
    if recipe.run.precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError("run.precision=fp16 needs an accelerator: choose bf16 or fp32 on a CPU")
    accelerator = make_accelerator(
        recipe.run.precision,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        log_with=list(recipe.run.trackers) or None,
        project_dir=run,
    )
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes

    found = newest_checkpoint(run)
    if found and (changed := differences(found[1]["recipe"], as_sections(recipe))):
        raise ValueError(another_run(run, changed, "run.output"))
    last = found[1]["step"] if found and found[1]["finished"] else None
    if found and last is not None and not evaluating.missing(recipe.evaluate, run, last, last):
        log.info("%s is finished (%d steps); nothing to do", run, found[1]["step"])
        return FINISHED

    # ---- images and steps --------------------------------------------------------------------------------------
    micro_batch, accumulation = divide_batch(recipe.batch.total, recipe.batch.per_device, world)
    # With a static graph torch cannot leave out the synchronization of the first micro-batches.
    accelerator.ddp_handler.static_graph = accumulation == 1
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

    # ---- method and optimizer ----------------------------------------------------------------------------------
    train_state = assemble(recipe, accelerator)
    method, spec = train_state.method, train_state.method.view_spec
    if micro_batch < 2 and any(batch_norms(method)):
        raise ValueError(
            f"batch.total={recipe.batch.total} over {world} processes with batch.per_device={recipe.batch.per_device} "
            "gives each process one image at a time, but batch norm needs at least two: raise batch.total or use "
            "fewer processes"
        )

    # ---- resume ------------------------------------------------------------------------------------------------
    start = 0
    if found:
        folder, state = found
        old = state["data"]
        if old["fingerprint"] != source.fingerprint:
            now = f"{len(source)} in {source.name}, not the same"
            changed = [f"the images: {old['images']} in {old['name']} -> {now}"]
            raise ValueError(another_run(run, changed, "run.output"))
        checkpoints.restore(folder, method, train_state.optimizer)
        log.info("resuming from %s", folder)
        start = state["step"]
    elif recipe.run.init_from:
        with accelerator.local_main_process_first():  # one of them fetches, the others find it
            begin_from(recipe.run.init_from, method, recipe.method_name)
    prepare(train_state)
    if found and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(found[1]["grad_scaler"])
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        (run / "recipe.yaml").write_text(yaml.safe_dump(as_sections(recipe), sort_keys=False))
        truncate_rows(run / "metrics.jsonl", start)
        truncate_rows(run / evaluating.ROWS, start)
    accelerator.wait_for_everyone()  # to read the same rows
    values = {
        k: v if isinstance(v, str | int | float | bool) else json.dumps(v) for k, v in flat(as_sections(recipe)).items()
    }
    accelerator.init_trackers(run.name, config=values)

    def save(done: int, failed: bool = False) -> Path:
        """Writes the checkpoint after `done` steps and returns its folder."""
        state = {
            "epoch": done // epoch_steps,
            "steps_total": steps,
            "finished": done == steps,
            "images_seen": done * recipe.batch.total,
            "method": recipe.method_name,
            "exported": method.exported,
            "backbone": recipe.backbone.model,
            "data": {"name": source.name, "fingerprint": source.fingerprint, "images": len(source)},
            "preprocessing": {"size": spec.views[0].size, "mean": list(spec.mean), "std": list(spec.std)},
            "versions": versions(),
            "hardware": hardware(device, world),
            "grad_scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            "recipe": as_sections(recipe),
        }
        assert {"step", "files", *state} == set(STATE)
        optimizer = train_state.optimizer
        return checkpoints.save(accelerator, run, done, method, optimizer, state, recipe.run.keep, failed)

    def evaluate(entries: Sequence[Evaluation], done: int) -> None:
        """Evaluates the run after `done` steps, on all processes."""
        seen = Preprocessing(spec.views[0].size, spec.mean, spec.std)
        report.evaluated(done, evaluating.results(entries, method, seen, accelerator, run, done))

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
        draft=recipe.data.draft,
        cache=recipe.data.cache,
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
    with (
        stop_requests(world) as asked_to_stop,
        Reporter(accelerator, run, start, steps, recipe.batch.total) as report,
        trace(run / "profile", recipe.run.profile and accelerator.is_main_process) as traced,
    ):
        # Those of the last step before a stop, too: it was saved before they were carried out.
        evaluate(evaluating.missing(recipe.evaluate, run, start, steps), start)
        batches = on_device(loader, device)
        for step in range(start, steps):
            torch.manual_seed(step_seed(recipe.run.seed, step, rank))
            rate = learning_rate(step, steps, warmup, peak, recipe.schedule.start_factor, recipe.schedule.final_factor)
            momentum = half_cosine(
                step, steps, recipe.schedule.teacher_momentum, recipe.schedule.final_teacher_momentum
            )
            micro_batches = report.crops(batches, accumulation)
            logs = take_step(train_state, micro_batches, accumulation, rate, momentum, step / epoch_steps)
            traced()
            report.progress.bar.update()

            done = step + 1
            stop = asked_to_stop()
            evaluations = evaluating.due(recipe.evaluate, done, steps)
            # Before an evaluation too, which may take long or meet broken data: that costs no training then.
            save_now = stop or done == steps or done % recipe.run.save_every == 0 or bool(evaluations)
            log_now = done % recipe.run.log_every == 0 or done in (1, steps)
            # The host waits for the device here and nowhere else.
            if (log_now or save_now or not train_state.deferred) and not healthy(train_state):
                bad = start + int(train_state.steps)
                folder = save(bad, failed=True)
                loss, norm = train_state.figures.tolist()
                raise FloatingPointError(
                    f"step {bad + 1}: the loss is {loss} and the gradient's norm {norm}; the optimizer has not stepped. "
                    f"The state is in {folder}, for inspection; starting the run again resumes from its last regular "
                    "checkpoint. Lower optimizer.learning_rate, lengthen schedule.warmup_epochs, or use "
                    "run.precision=fp32"
                )
            if log_now:
                schedule = {"epoch": done / epoch_steps, "learning_rate": rate, "teacher_momentum": momentum}
                report.row(done, train_state.figures, logs, schedule)
            if save_now:
                report.progress.sync()
                save(done)
            if stop and done < steps:
                log.info("asked to stop: saved after step %d; start the run again to resume", done)
                return STOPPED
            evaluate(evaluations, done)

    log.info("finished after %d steps. Next: clove-hub export %s", steps, shlex.quote(str(run)))
    return FINISHED


# ---- pieces ----------------------------------------------------------------------------------------------------------


def learning_rate(
    step: int, steps: int, warmup: int, peak: float, start_factor: float = 0.01, final_factor: float = 0.01
) -> float:
    """A straight line from start_factor * peak to peak over `warmup` steps, then half a cosine to final_factor * peak.

    Both ends of the line are reached, so the peak is held for two steps, as in the released code.
    """
    if step < warmup:
        progress = step / (warmup - 1) if warmup > 1 else 0.0
        return peak * (start_factor + (1 - start_factor) * progress)
    return peak * half_cosine(step - warmup, steps - warmup, 1.0, final_factor)


def half_cosine(step: int, steps: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 toward `end`, which step `steps` would reach."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


def begin_from(source: str, method: nn.Module, name: str) -> None:
    """Loads the whole state of a method, every tensor in its place; optimizer, schedule and step are those of a new run.

    Args:
        source: another run's folder or a released checkpoint, as in `load_method`.
        method: the one to begin; left as it is if anything is wrong.
        name: its name in the registry.

    Raises:
        ValueError: there is no such state, it cannot be fetched or is damaged, it is another method's, or a tensor is
            missing, unexpected or mis-shaped.
    """
    try:
        found = load_method(source)
    except ValueError as error:
        raise ValueError(f"run.init_from={source}: {error}") from error
    if found.name != name:
        raise ValueError(
            f"run.init_from={source} is the state of {found.name!r}, and this recipe trains {name!r}: "
            "take a state of the same method"
        )
    expected = {key: tensor.shape for key, tensor in method.state_dict().items()}
    require_names_and_shapes(found.tensors, expected, f"run.init_from={source} for this recipe's method and backbone")
    method.load_state_dict(found.tensors)
    log.info("starting with the weights of %s", found.what)


@contextlib.contextmanager
def trace(folder: Path, wanted: bool) -> Iterator[Callable[[], None]]:
    """Profiles steps 10 to 20 of what is done in the context into `folder`; yields what to call after each step."""
    if not wanted:
        yield lambda: None
        return

    def write(profiler: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        (folder / "summary.txt").write_text(profiler.key_averages().table(sort_by="cpu_time_total", row_limit=-1))
        log.info("profiled ten steps into %s (open trace.json in Perfetto or chrome://tracing)", folder)

    schedule = torch.profiler.schedule(wait=8, warmup=2, active=10, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write, record_shapes=True) as profiler:
        yield profiler.step


def healthy(train_state: TrainState) -> bool:
    """Whether everything was finite so far, and float16's scale has not run out."""
    scaler = train_state.accelerator.scaler
    return bool(train_state.finite) and (scaler is None or scaler.get_scale() >= 1)


def versions() -> dict[str, str]:
    packages = ("clove-hub", "torch", "timm", "accelerate", "safetensors", "numpy", "pillow")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def hardware(device: torch.device, world: int) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{world} x {name} ({device.type})"
