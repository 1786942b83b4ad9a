"""The output of a run: a progress bar, metrics.jsonl, Accelerate's trackers, and the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor
from torch.profiler import record_function

from clove_hub.evaluation.result import Record
from clove_hub.runs import METRICS
from clove_hub.views import CropBatch

from .data import LoadedBatch
from .outlook import SETTLED, Memory, memory, memory_in_words, outlook
from .run.folder import RunFolder
from .run.progress import Progress

log = logging.getLogger(__name__)

COLLAPSED = 0.1
"""An embedding spread below this is worth a warning: it is near 1 in a healthy run and 0 in a collapsed one."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise an error for a tracker that is not installed, which Accelerate ignores silently."""
    available = sorted(str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers())
    for name in names:
        if name not in available:
            raise ValueError(
                f"run.trackers names {name!r}, which Accelerate cannot use here: install its package, or choose "
                f"from what is installed ({', '.join(available) or 'no tracker'})"
            )


class Reporter:
    """Reports on the main process only. A context manager, so that the last row is kept."""

    def __init__(self, accelerator: Accelerator, folder: RunFolder, start: int, steps: int, batch: int) -> None:
        self.accelerator, self.folder = accelerator, folder
        self.batch, self.steps = batch, steps
        self.progress = Progress(accelerator.is_main_process, start, steps)
        self.broken: set[str] = set()
        self.waited = 0.0
        self.settling = (start + 1, min(start + SETTLED, steps))
        """The steps between which the speed is measured of which `stepped` tells: the first is not like the others."""
        self.began = (start, self.progress.clock())
        self.waited_since = 0.0

    def __enter__(self) -> Reporter:
        self.progress.__enter__()
        return self

    def __exit__(self, kind: object, *error: Any) -> None:
        self.progress.__exit__(kind, *error)
        if kind is None:
            self.accelerator.end_training()
            return
        for tracker in self.accelerator.trackers:  # after an error, the processes do not end together
            tracker.finish()

    def crops(self, batches: Iterator[LoadedBatch], count: int) -> Iterator[CropBatch]:
        """The crops of the next `count` batches; the time until each arrives counts as waiting for data.

        Each unusable image is logged once, by the process that read it.
        """
        for _ in range(count):
            waiting = time.perf_counter()
            with record_function("data"):
                batch = next(batches)
            waited = time.perf_counter() - waiting
            self.waited += waited
            self.waited_since += waited
            for name, reason in batch.broken:
                if name not in self.broken:
                    self.broken.add(name)
                    log.warning("replaced the image %s: %s", name, reason)
            yield batch.crops

    def stepped(self, step: int, figures: Tensor) -> None:
        """Advance the bar after a step; once the speed has settled, log it and the estimated end of the run.

        Args:
            figures: of the step, on the device, which is waited for where its time counts.
        """
        self.progress.bar.update()
        if step not in self.settling:
            return
        figures.tolist()
        now, (first, since) = self.progress.clock(), self.began
        if step < self.settling[1]:
            self.began, self.waited_since = (step, now), 0.0
            return
        device = self.accelerator.device
        own = memory(device)
        figures = torch.tensor([self.waited_since / (now - since), own.host, own.device or 0.0], device=device)
        waited, host, on_device = self.accelerator.gather(figures[None]).amax(0).tolist()
        if self.accelerator.is_main_process:
            speed = outlook(step - first, self.steps - step, now - since, self.batch, waited, datetime.now())
            held = memory_in_words(Memory(host, None if own.device is None else on_device), device)
            log.info("step %d: %s. A process uses at most %s", step, speed, held)

    def row(self, step: int, figures: Tensor, logs: Mapping[str, Tensor], schedule: Mapping[str, float]) -> None:
        """One row of metrics after `step` steps, with the speed since the last one.

        Args:
            figures: loss and gradient norm, the same on every process.
            logs: the method's, of this process.
        """
        loss, norm = figures.tolist()
        names = sorted(logs)
        means = self.accelerator.reduce(torch.stack([logs[name] for name in names]), "mean").tolist()
        values = {"loss": loss, "gradient_norm": norm, **schedule, **dict(zip(names, means, strict=True))}
        spread = values["embedding_spread"]
        steps, seconds = self.progress.lap(step)
        images = steps * self.batch / seconds
        speed = {"images_per_second": images, "waiting_for_data": self.waited / seconds}
        self.waited = 0.0
        # Since the process started, over all processes.
        broken = self.accelerator.reduce(torch.tensor(len(self.broken), device=self.accelerator.device), "sum")
        if not self.accelerator.is_main_process:
            return
        held = {f"{name}_memory_gb": most for name, most in memory(self.accelerator.device)._asdict().items() if most}
        record = {"step": step, **values, **speed, **held, "broken_images": int(broken)}
        self.folder.append(METRICS, record)
        self.progress.show({"loss": f"{loss:.4f}", "images/s": f"{images:.1f}", "spread": f"{spread:.2f}"})
        self.accelerator.log({key: value for key, value in record.items() if key != "step"}, step=step)
        if spread < COLLAPSED:
            log.warning(
                "step %d: the teacher's embeddings have nearly collapsed into a point (spread %.3f, healthy runs "
                "stay near 1): lower optimizer.learning_rate or raise schedule.teacher_momentum",
                step,
                spread,
            )

    def evaluated(self, step: int, found: Iterable[tuple[str, Record]]) -> None:
        """Run the evaluations, whose time does not count for the speed, and log their metrics."""
        with self.progress.paused():
            for label, record in found:
                values = {f"evaluate/{label}/{name}": value for name, value in record.metrics.items()}
                self.accelerator.log(values, step=step)
                said = ", ".join(f"{name} {value:.2f}" for name, value in record.metrics.items())
                log.info("step %d: %s: %s", step, label, said)
