"""The progress of a run: rows in metrics.jsonl, and a bar.

A file of rows has a JSON object with a `step` in each line; a last line that was cut off does not count.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from clove_hub.evaluation.result import write_text
from clove_hub.runs import complete_lines


def truncate_rows(path: Path, step: int) -> None:
    """Drops the rows after `step`, which the run is going to write again, and a last one that was cut off."""
    if path.is_file():
        write_text(path, "".join(line for line in complete_lines(path) if json.loads(line)["step"] <= step))


def redraw_interval() -> float:
    """Seconds: a terminal is redrawn ten times a second, a log file gets a line now and then."""
    return 0.1 if sys.stderr.isatty() else 10


class Progress:
    """The bar and RUN/metrics.jsonl, on the main process alone.

    A context manager, within which log messages stand above the bar.

    Args:
        run: the run's folder.
        main: whether this is the main process.
        start: the step that the run starts or resumes at.
        steps: the last one.
    """

    def __init__(self, run: Path, main: bool, start: int, steps: int) -> None:
        self.metrics = (run / "metrics.jsonl").open("a", encoding="utf-8") if main else None
        self.bar = tqdm(
            total=steps, initial=start, disable=not main, mininterval=redraw_interval(), unit="step", dynamic_ncols=True
        )
        self.redirect = logging_redirect_tqdm()
        self.since, self.since_step = time.perf_counter(), start

    def __enter__(self) -> Progress:
        self.redirect.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.redirect.__exit__(*error)
        self.bar.close()
        if self.metrics is not None:
            self.metrics.close()

    def lap(self, step: int) -> tuple[int, float]:
        """Steps and seconds since the last lap, which now ends after `step` steps."""
        now = time.perf_counter()
        lap = step - self.since_step, now - self.since
        self.since, self.since_step = now, step
        return lap

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in the context belongs to no step: its time does not count."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def write(self, row: Mapping[str, Any]) -> None:
        """A row of metrics; on the other processes nothing."""
        if self.metrics is not None:
            self.metrics.write(json.dumps(row) + "\n")
            self.metrics.flush()

    def show(self, figures: Mapping[str, str]) -> None:
        """Figures at the end of the bar."""
        self.bar.set_postfix(figures, refresh=False)

    def sync(self) -> None:
        """Flushes the rows to the disk, before a checkpoint counts on them."""
        if self.metrics is not None:
            os.fsync(self.metrics.fileno())
