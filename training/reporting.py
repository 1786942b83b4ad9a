"""What a run says while it goes on: a progress bar, metrics.jsonl, Accelerate's trackers, and its log."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor
from torch.profiler import record_function
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from clove_hub.evaluation.result import Record
from clove_hub.views import CropBatch

from .data import LoadedBatch

log = logging.getLogger(__name__)

COLLAPSED = 0.1
"""An embedding spread below this is worth a warning: it is near 1 in a healthy run and 0 in a collapsed one."""


def check_trackers(names: Sequence[str]) -> None:
    """Accelerate passes over a tracker that is not installed in silence; here it is an error."""
    available = sorted(str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers())
    for name in names:
        if name not in available:
            raise ValueError(
                f"run.trackers asks for {name!r}, which Accelerate cannot use here: install its package, or choose "
                f"from {', '.join(available) or 'none (no tracker is installed)'}"
            )


class Reporter:
    """Writes on the main process and is silent on the others. A context manager, so that the last row is kept."""

    def __init__(self, accelerator: Accelerator, run: Path, start: int, steps: int, batch: int) -> None:
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        self.batch = batch
        self.metrics = (run / "metrics.jsonl").open("a") if self.main else None
        # A terminal is redrawn ten times a second, a log file gets a line now and then.
        interval = 0.1 if sys.stderr.isatty() else 10
        self.bar = tqdm(
            total=steps, initial=start, disable=not self.main, mininterval=interval, unit="step", dynamic_ncols=True
        )
        self.redirect = logging_redirect_tqdm()
        self.broken: set[str] = set()
        self.rows = 0
        self.since = time.perf_counter()
        self.since_step = start
        self.waited = 0.0

    def __enter__(self) -> Reporter:
        self.redirect.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.redirect.__exit__(kind, error, trace)
        self.bar.close()
        if self.metrics is not None:
            self.metrics.close()
        self.accelerator.end_training()

    def broken_images(self, images: Sequence[tuple[str, str]]) -> None:
        """Names each image that could not be used, once; every process speaks of those that it met itself."""
        for name, reason in images:
            if name not in self.broken:
                self.broken.add(name)
                log.warning("replaced the image %s: %s", name, reason)

    def crops(self, batches: Iterator[LoadedBatch], count: int) -> Iterator[CropBatch]:
        """The crops of the next `count` batches; the time until each is there is the time spent waiting for data."""
        for _ in range(count):
            waiting = time.perf_counter()
            with record_function("data"):
                batch = next(batches)
            self.waited += time.perf_counter() - waiting
            self.broken_images(batch.broken)
            yield batch.crops

    def advance(self) -> None:
        self.bar.update()

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
        now = time.perf_counter()
        done = max(step - self.since_step, 1)
        images = done * self.batch / (now - self.since)
        speed = {"images_per_second": images, "waiting_for_data": self.waited / (now - self.since)}
        self.since, self.since_step, self.waited = now, step, 0.0
        # Since the process started, over all processes.
        broken = self.accelerator.reduce(torch.tensor(len(self.broken), device=self.accelerator.device), "sum")
        if self.metrics is None:
            return
        record = {"step": step, **values, **speed, "broken_images": int(broken)}
        self.metrics.write(json.dumps(record) + "\n")
        self.metrics.flush()
        self.bar.set_postfix(
            {
                "loss": f"{values['loss']:.4f}",
                "images/s": f"{images:.1f}",
                "spread": f"{values['embedding_spread']:.2f}",
            },
            refresh=False,
        )
        self.accelerator.log({key: value for key, value in record.items() if key != "step"}, step=step)
        if values["embedding_spread"] < COLLAPSED:
            log.warning(
                "step %d: the teacher's embeddings have nearly collapsed into a point (spread %.3f, healthy runs "
                "stay near 1): lower optimizer.learning_rate or raise schedule.teacher_momentum",
                step,
                values["embedding_spread"],
            )

    def evaluated(self, step: int, found: Iterable[tuple[str, Record]]) -> None:
        """Carries the evaluations out, which the speed of the run does not count, and says what each has found."""
        began = time.perf_counter()
        for label, record in found:
            values = {f"evaluate/{label}/{name}": value for name, value in record.metrics.items()}
            self.accelerator.log(values, step=step)
            said = ", ".join(f"{name} {value:.2f}" for name, value in record.metrics.items())
            log.info("step %d: %s: %s", step, label, said)
        self.since += time.perf_counter() - began

    def sync(self) -> None:
        """Has the disk hold the rows, before a checkpoint says that they are there."""
        if self.metrics is not None:
            os.fsync(self.metrics.fileno())


def configure_logging(main: bool) -> None:
    """Warnings from every process, the rest from the main one."""
    logging.basicConfig(
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if main else logging.WARNING,
        force=True,
    )
    for noisy in ("httpx", "datasets", "fsspec", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def flatten(sections: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """A recipe as trackers want their hyper-parameters: one level, simple values."""
    named = {
        f"{section}.{key}" if key else section: value
        for section, values in sections.items()
        for key, value in (values.items() if isinstance(values, Mapping) else [("", values)])
    }
    return {
        name: value if isinstance(value, str | int | float | bool) else json.dumps(value)
        for name, value in named.items()
    }
