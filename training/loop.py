"""The trainer: one recipe from its first step to its last, on one device or many, for any method.

Read from top to bottom. Everything random is a function of (seed, epoch, image) or (seed, step, process), and
everything that varies is a function of the step, so that an interrupted run continues exactly as if it had not been.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import shlex
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import DistributedDataParallelKwargs

from clove_hub.batch_norm import batch_norms, group_batch_norms
from clove_hub.runs import METRICS, STATE, STATE_FILE, checkpoint_folders, read_state
from clove_hub.settings import flat

from . import evaluating
from .data import advise_draft, make_loader, steps_per_epoch
from .recipe import Recipe, as_sections
from .reporting import Reporter, check_trackers
from .run.changes import changes_of
from .run.device import make_accelerator
from .run.folder import RunFolder
from .run.peers import TROUBLE, PeerFailed, Peers, starting
from .run.sampler import data_position, divide_batch, divide_norms, step_seed
from .run.stopping import FINISHED, StopRequests, never
from .same_run import AMENDABLE, OF_A_HOST, differences
from .schedule import half_cosine, learning_rate, make_schedule, weight_decay
from .settings import Evaluation
from .sizing import images_in_pass, memory_explained, workers_of
from .sources import open_source
from .start import begin
from .step import TrainState, assemble, normalize, on_device, prepare, take_step

log = logging.getLogger(__name__)


def train(recipe: Recipe, stop_requests: StopRequests = never) -> int:
    """Trains until the recipe's last step or a stop request; returns the exit code: FINISHED, STOPPED or INTERRUPTED.

    Args:
        stop_requests: `listen` where signals ask a run to stop, as they do for a command.

    Raises:
        ValueError: wrong input, found before the first step.
        FloatingPointError: the loss or a gradient was not finite; the weights are still those of the step before.
        OSError: a file of the run cannot be written, a data-loading worker or another process of the run has ended.
    """
    # ---- process and precision ---------------------------------------------------------------------------------
    with starting():
        check_trackers(recipe.run.trackers)
        evaluating.check(recipe.evaluate)
        if recipe.run.precision == "fp16" and not torch.accelerator.is_available():
            raise ValueError("run.precision=fp16 needs an accelerator: choose bf16 or fp32 on a CPU")
    run = Path(recipe.run.output)
    accelerator = make_accelerator(
        recipe.run.precision,
        recipe.run.timeout,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        log_with=list(recipe.run.trackers) or None,
        project_dir=run,
    )
    peers, device = Peers(recipe.run.timeout), accelerator.device
    with stop_requests() as asked_to_stop:
        with peers.together():
            nothing_left = peers.main and is_finished(recipe, run)
        if peers.from_main(nothing_left):
            log.info("%s is finished; nothing to do", run)
            return FINISHED

        # ---- images, steps, method and optimizer -------------------------------------------------------------------
        with peers.together():
            source = open_source(recipe.data)
            schedule = make_schedule(recipe, steps_per_epoch(source, recipe.batch.total))
            evaluations = evaluating.guarding(recipe, schedule.steps)
        per_device = images_in_pass(recipe, accelerator, peers, run)
        with peers.together():
            micro_batch, accumulation = divide_batch(recipe.batch.total, per_device, peers.world)
            train_state = assemble(recipe, accelerator)
            method = train_state.method
            normalizes = any(batch_norms(method))
            if normalizes:
                group = divide_norms(recipe.batch.norm_group, recipe.batch.total, micro_batch, peers.world)
            data = {"name": source.name, "fingerprint": source.fingerprint, "images": len(source)}
        settings = {key: value for key, value in flat(as_sections(recipe)).items() if key not in OF_A_HOST}
        peers.require_same(settings | {"the fingerprint of the images": data["fingerprint"]})
        if normalizes:
            with peers.together():
                group_batch_norms(method, group, micro_batch, recipe.run.timeout)
        # With a static graph torch cannot leave out the synchronization of the first micro-batches.
        accelerator.ddp_handler.static_graph = accumulation == 1

        with RunFolder(run, peers, recipe.run.keep, "run.output") as folder:
            # ---- resume --------------------------------------------------------------------------------------------
            changes: list[dict[str, Any]] = []
            if folder.found:
                with peers.together():
                    before, now = folder.found[1], as_sections(recipe)
                    foreign = differences(before["recipe"], now, AMENDABLE)
                    if (old := before["data"])["fingerprint"] != data["fingerprint"]:
                        new = f"{len(source)} in {source.name}, not the same"
                        if "changes" not in before:  # their sizes did not count in version 0.1
                            new += " or read by an earlier version of clove-hub, which then can resume the run"
                        foreign.append(f"the images: {old['images']} in {old['name']} -> {new}")
                    changes = changes_of(
                        run,
                        before,
                        changed=list(dict.fromkeys([*foreign, *differences(before["recipe"], now)])),
                        foreign=foreign,
                        amend=recipe.run.amend,
                        steps=schedule.steps,
                        option="run.output",
                        way_out=f" A new run can start with its weights: run.init_from={shlex.quote(str(run))}.",
                    )
            found = folder.found and folder.found[1]
            pretrained, images = begin(recipe, method, train_state.optimizer, peers, found)
            spec = normalize(train_state, images)
            start = folder.restore(method, train_state.optimizer)
            prepare(train_state)
            if folder.found and accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(folder.found[1]["grad_scaler"])
            folder.write_text("recipe.yaml", yaml.safe_dump(as_sections(recipe), sort_keys=False))
            folder.truncate(METRICS, start)
            folder.truncate(evaluating.ROWS, start)
            measured = settings | {"batch.per_device": micro_batch}
            values = {k: v if isinstance(v, str | int | float | bool) else json.dumps(v) for k, v in measured.items()}
            with peers.together():
                accelerator.init_trackers(run.name, config=values)

            def state(done: int) -> dict[str, Any]:
                """What state.json says after `done` steps."""
                said = {
                    "epoch": done // schedule.epoch_steps,
                    "steps_total": schedule.steps,
                    "finished": done == schedule.steps,
                    "images_seen": done * recipe.batch.total,
                    "method": recipe.method_name,
                    "exported": method.exported,
                    "backbone": recipe.backbone.model,
                    "data": data,
                    "preprocessing": {"size": images.size, "mean": list(images.mean), "std": list(images.std)},
                    "versions": versions(),
                    "hardware": hardware(device, peers.world),
                    "per_device": micro_batch,
                    "grad_scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                    "recipe": as_sections(recipe),
                    "changes": changes,
                    "pretrained": pretrained,
                }
                assert {"step", "files", *said} == {"changes", "per_device", "pretrained", *STATE}
                return said

            def save(done: int, failed: bool = False) -> Path:
                return folder.save(done, method, train_state.optimizer, state(done), failed)

            def rescue() -> None:
                """Saves what a failure has left, in the main process alone."""
                if done > start and healthy(train_state):
                    folder.write(done, method, train_state.optimizer, state(done))

            def evaluate(entries: Sequence[Evaluation], done: int) -> None:
                """Evaluates the run after `done` steps, on all processes."""
                report.evaluated(done, evaluating.results(entries, method, images, recipe.backbone.args, folder, done))
                if entries and pretrained and peers.main:
                    evaluating.warn_where_it_hurts(folder.path)

            # ---- the loop ------------------------------------------------------------------------------------------
            workers = workers_of(recipe.data.workers, peers)
            with peers.together():
                loader = make_loader(
                    source,
                    spec,
                    seed=recipe.run.seed,
                    global_batch=recipe.batch.total,
                    micro_batch=micro_batch,
                    rank=peers.rank,
                    world=peers.world,
                    start_step=start,
                    stop_step=schedule.steps,
                    skip=recipe.data.skip,
                    workers=workers,
                    pin_memory=device.type == "cuda",
                    draft=recipe.data.draft,
                    cache=recipe.data.cache,
                    minutes=recipe.run.timeout,
                )
            if peers.main and recipe.data.draft is None and recipe.data.reading.of_photos:
                advise_draft(source, spec)
            origin = pretrained["source"] if pretrained else recipe.run.init_from or "scratch"
            log.info(
                "%s: %s on %s, %d images from %s, %d steps of %d (%d process%s x %d x %d%s), %s",
                run,
                recipe.method_name,
                recipe.backbone.model,
                len(source),
                source.name,
                schedule.steps,
                recipe.batch.total,
                peers.world,
                "es" if peers.world > 1 else "",
                micro_batch,
                accumulation,
                f", batch norm over {group}" if normalizes else "",
                f"from step {start}" if start else f"from {origin}",
            )
            done = start
            with (
                Reporter(accelerator, folder, start, schedule.steps, recipe.batch.total) as report,
                trace(run / "profile", recipe.run.profile and peers.main) as traced,
                folder.rescuing(train_state.undo, rescue),
            ):
                # Including those of the last step before a stop, which was saved before they were carried out.
                evaluate(peers.from_main(evaluating.missing(evaluations, run, start, schedule.steps)), start)
                batches = on_device(loader, device)
                for step in range(start, schedule.steps):
                    # A process that has no images takes no part in the step; the others would wait for it.
                    micro_batches, code, trouble = report.crops(batches, accumulation), asked_to_stop(), None
                    if peers.world > 1 and not code:
                        try:
                            micro_batches = iter(list(micro_batches))
                        except (ValueError, OSError) as error:
                            code, trouble = TROUBLE, error
                    if code := peers.highest(code):
                        if step:
                            save(step)
                        if code == TROUBLE:
                            raise trouble or PeerFailed(
                                "another process has no images for the next step; see its own error"
                            )
                        log.info("asked to stop: saved after step %d; start the run again to resume", step)
                        return code

                    torch.manual_seed(step_seed(recipe.run.seed, step, peers.rank))
                    rate = learning_rate(
                        *(step, schedule.steps, schedule.warmup, schedule.peak),
                        *(recipe.schedule.start_factor, recipe.schedule.final_factor),
                        warmup_to_peak=recipe.schedule.warmup_to_peak,
                        decay_every=schedule.epoch_steps if recipe.schedule.decay == "epoch" else 1,
                    )
                    decay = weight_decay(step, schedule.steps, recipe)
                    momentum = half_cosine(
                        *(step, schedule.steps),
                        *(recipe.schedule.teacher_momentum, recipe.schedule.final_teacher_momentum),
                    )
                    epoch = step / schedule.epoch_steps
                    with memory_explained(recipe, micro_batch, peers.world, normalizes):
                        logs = take_step(train_state, micro_batches, accumulation, rate, momentum, epoch, decay)
                    done = step + 1
                    traced()
                    report.stepped(done, train_state.figures)

                    due = evaluating.due(evaluations, done, schedule.steps)
                    # Also before an evaluation, which may take long or fail on broken data: no training is lost then.
                    save_now = done == schedule.steps or done % recipe.run.save_every == 0 or bool(due)
                    log_now = done % recipe.run.log_every == 0 or done in (1, schedule.steps)
                    # The host waits for the device here and nowhere else.
                    if (log_now or save_now or not train_state.deferred) and not healthy(train_state):
                        bad = start + int(train_state.steps)
                        failed = save(bad, failed=True)
                        raise FloatingPointError(diverged(recipe, train_state, bad, failed, folder.saved))
                    if log_now:
                        varying = {"epoch": done / schedule.epoch_steps, "learning_rate": rate}
                        report.row(done, train_state.figures, logs, varying | {"teacher_momentum": momentum})
                    if save_now:
                        save(done)
                    evaluate(due, done)

    log.info("finished after %d steps. Next: clove-hub export %s", schedule.steps, shlex.quote(str(run)))
    return FINISHED


# ---- pieces ----------------------------------------------------------------------------------------------------------


def is_finished(recipe: Recipe, run: Path) -> bool:
    """Whether the run in this folder has nothing left to do, without writing anything."""
    try:
        folders = checkpoint_folders(run)
        if not folders or not json.loads((folders[0] / STATE_FILE).read_text(encoding="utf-8"))["finished"]:
            return False
        state = read_state(folders[0])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False  # opening the folder reports what is wrong
    if differences(state["recipe"], as_sections(recipe)):
        return False
    for older in folders[1:]:
        try:
            read_state(older)
        except ValueError as error:
            log.warning("the checkpoint %s is damaged: %s. The run does not need it: remove it", older, error)
    evaluations = evaluating.guarding(recipe, state["steps_total"])
    return not evaluating.missing(evaluations, run, state["step"], state["step"])


def diverged(recipe: Recipe, train_state: TrainState, bad: int, failed: Path, saved: int | None) -> str:
    """What happened in the step after `bad` steps, and how to go on."""
    loss, norm = train_state.figures.tolist()
    batch = data_position(bad, recipe.data.skip) + 1
    back = f"resumes from step {saved}" if saved else "starts from the beginning"
    return (
        f"step {bad + 1}: the loss is {loss} and the gradient's norm {norm}; the optimizer has not stepped. The state is in "
        f"{failed}, for inspection. The same command {back} and fails here again. To continue, add run.amend=true with a lower "
        f"optimizer.learning_rate (now {recipe.optimizer.learning_rate:g}), with run.precision=fp32, or with "
        f"'data.skip=[[{max(batch - 10, 1)},{batch + 10}]]', which leaves these batches out"
    )


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
        log.info("a profile of ten steps is in %s (open trace.json in Perfetto or chrome://tracing)", folder)

    schedule = torch.profiler.schedule(wait=8, warmup=2, active=10, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write, record_shapes=True) as profiler:
        yield profiler.step


def healthy(train_state: TrainState) -> bool:
    """Whether everything was finite so far, and float16's scale has not fallen too low."""
    scaler = train_state.accelerator.scaler
    return bool(train_state.finite) and (scaler is None or scaler.get_scale() >= 1)


def versions() -> dict[str, str]:
    packages = ("clove-hub", "torch", "timm", "accelerate", "safetensors", "numpy", "pillow")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def hardware(device: torch.device, world: int) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{world} x {name} ({device.type})"
