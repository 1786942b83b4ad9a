"""Seeds of a task in another framework: each trained in a separate process, with its inputs and outputs.

For both Detectron2 and MMSegmentation.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from clove_hub.command import INTERRUPTED
from clove_hub.processes import STOPPED, STOPS
from clove_hub.settings import differences

log = logging.getLogger(__name__)

SCORES = "scores.json"
"""The file that a finished seed writes, beside the framework's own files."""
DIVERGED = "diverged.txt"
"""The file that a seed with a non-finite loss or weights writes: the reason, in a sentence."""


@dataclass(frozen=True)
class Found:
    """A data set on disk."""

    train: int
    """Images."""
    test: int
    fingerprint: str
    """64 hexadecimal digits that change with the annotations and the images' sizes, but not with their location."""


class Trained(NamedTuple):
    """The results after every seed has ended."""

    scores: dict[int, Any]
    """The content of SCORES of each seed that did not diverge."""
    diverged: list[str]
    """A sentence for each seed that diverged."""
    seconds: float | None
    """Training time; None if an earlier call trained some seeds, since its time is not known."""


def unlike(found: Found, published: tuple[int, int]) -> list[str]:
    """Differences of a data set from the published one, in sentences: such a result is not comparable with the papers'.

    Args:
        published: images in training, and in the test split.
    """
    counts = zip(("trained on", "scored on"), (found.train, found.test), published, strict=True)
    return [f"{what} {count} images, the data set has {usual}" for what, count, usual in counts if count != usual]


def finished(out: Path, number: int) -> bool:
    """Whether a seed has ended, scored or diverged."""
    return any((out / f"seed_{number}" / name).is_file() for name in (SCORES, DIVERGED))


def run_seeds(out: Path, runs: int, train: Callable[[int, Path], bool]) -> Trained | None:
    """Train every seed that has neither scores nor diverged. One that diverges does not stop the others.

    Args:
        train: trains a seed, given by its number and its folder, as `run_seed` does.

    Returns:
        None after a signal.

    Raises:
        FloatingPointError: all have diverged.
        ChildProcessError, KeyboardInterrupt: from `train`.
    """
    began, before = time.perf_counter(), any(path.is_dir() for path in out.glob("seed_*"))
    scores: dict[int, Any] = {}
    diverged = []
    for number in range(runs):
        folder = out / f"seed_{number}"
        if not finished(out, number):
            try:
                if not train(number, folder):
                    return None
            except ChildProcessError:
                if not (folder / DIVERGED).is_file():
                    raise
        if (folder / SCORES).is_file():
            scores[number] = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        else:
            diverged.append(f"seed {number} diverged and is left out: {(folder / DIVERGED).read_text('utf-8').strip()}")
            log.warning("%s: %s", out, diverged[-1])
    if not scores:
        raise FloatingPointError("; ".join(diverged))
    return Trained(scores, diverged, None if before else round(time.perf_counter() - began, 3))


def run_seed(words: Sequence[str], folder: Path, logs: str) -> bool:
    """Train one seed in a separate process: otherwise a framework would write a second log into the first.

    Signals are forwarded to that process, which saves a checkpoint after its iteration and ends; it also does so if
    this one is killed.

    Args:
        words: the arguments of Python that start it.
        folder: where it writes SCORES.
        logs: the framework's log files in it, for the message.

    Returns:
        Whether it was trained and scored; False after a signal.

    Raises:
        KeyboardInterrupt: the signal was SIGINT.
        ChildProcessError: it ended before it was scored, without a signal.
    """
    asked: list[int] = []
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for process in started:
            process.send_signal(number)

    before = {number: signal.getsignal(number) for number in STOPS}
    for number in STOPS:
        if before[number] is not signal.SIG_IGN:  # ignored, as under nohup
            signal.signal(number, pass_on)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # inherited: pending until the process can handle them
    try:
        process = subprocess.Popen([sys.executable, *words])
        started.append(process)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for early in asked:  # signals from before the process existed
            process.send_signal(early)
        code = process.wait()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
    scored = (folder / SCORES).is_file()
    if asked or code in (STOPPED, INTERRUPTED):
        what = f"{folder} is {'done' if scored else 'stopped'}: run the same command again to resume"
        if signal.SIGINT in asked or code == INTERRUPTED:
            raise KeyboardInterrupt(what)
        log.warning(what)  # unlike print, it may fail: the terminal may be gone
        return False
    if code or not scored:
        raise ChildProcessError(
            f"{folder}: training ended with exit code {code}; the reason is above and in {folder / logs}. "
            "Once it is fixed, run the same command again to resume from the last checkpoint"
        )
    return True


def count_gpus(wanted: int | None) -> int:
    """Number of GPUs to use; 0 for the CPU.

    Raises:
        ValueError: there are fewer GPUs.
    """
    there = torch.cuda.device_count()
    if wanted is None and there == 0:
        raise ValueError(
            "PyTorch finds no GPU (https://pytorch.org/get-started/locally/); --gpus 0 runs on the CPU, where a complete "
            "protocol would take months"
        )
    if wanted is not None and not 0 <= wanted <= there:
        raise ValueError(f"--gpus {wanted}, but PyTorch finds {there}: give a number from 0 to {there}")
    return there if wanted is None else wanted


def require_same(path: Path, facts: Mapping[str, Any]) -> None:
    """Raise ValueError if the folder holds runs of another set-up."""
    if not path.is_file():
        return
    if changed := differences(json.loads(path.read_text(encoding="utf-8")), facts, ()):
        raise ValueError(
            f"{path.parent} holds runs with other settings ({'; '.join(changed[:4])}): choose another --out"
        )
