"""Seeds of a task in another framework: each trained in a process of its own, with what that needs and leaves.

Detectron2 and MMSegmentation alike.
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
"""What a finished seed leaves, beside what the framework itself writes."""
DIVERGED = "diverged.txt"
"""What a seed leaves whose loss or weights are no longer finite: the reason, in a sentence."""


@dataclass(frozen=True)
class Found:
    """A data set in its place."""

    train: int
    """Images."""
    test: int
    fingerprint: str
    """64 hexadecimal digits that change with the annotations and with the images' sizes, wherever they are stored."""


class Trained(NamedTuple):
    """All seeds once each has an end."""

    scores: dict[int, Any]
    """What each seed that did not diverge has left in SCORES."""
    diverged: list[str]
    """A sentence for each of the others."""
    seconds: float | None
    """None where an earlier call has trained some: of that the time is not known."""


def unlike(found: Found, published: tuple[int, int]) -> list[str]:
    """What in a data set is not as it was published, in sentences: such a result is not to be held for the papers'.

    Args:
        published: images in training, and in the test split.
    """
    counts = zip(("trained on", "scored on"), (found.train, found.test), published, strict=True)
    return [f"{what} {count} images, the data set has {usual}" for what, count, usual in counts if count != usual]


def finished(out: Path, number: int) -> bool:
    """Whether a seed has an end, good or bad."""
    return any((out / f"seed_{number}" / name).is_file() for name in (SCORES, DIVERGED))


def run_seeds(out: Path, runs: int, train: Callable[[int, Path], bool]) -> Trained | None:
    """Trains every seed that is neither scored nor has diverged. One that diverges does not stop the others.

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
    """One seed, in a process of its own: a framework would write the log of a second one into that of the first.

    Signals go on to that process, which saves a checkpoint after its iteration and ends; it also does so if this one is
    killed.

    Args:
        words: the arguments of Python that start it.
        folder: where it leaves SCORES.
        logs: the framework's files in it that say what happened, for the message.

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
        if before[number] is not signal.SIG_IGN:  # as nohup does
            signal.signal(number, pass_on)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # for the other process: they wait until it can answer
    try:
        process = subprocess.Popen([sys.executable, *words])
        started.append(process)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for early in asked:  # before it was there to be told
            process.send_signal(early)
        code = process.wait()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
    scored = (folder / SCORES).is_file()
    if asked or code in (STOPPED, INTERRUPTED):
        what = f"{folder} is {'done' if scored else 'stopped'}: the same command goes on"
        if signal.SIGINT in asked or code == INTERRUPTED:
            raise KeyboardInterrupt(what)
        log.warning(what)  # unlike print, it may fail: the terminal may be gone
        return False
    if code or not scored:
        raise ChildProcessError(
            f"{folder}: training ended with exit code {code}; why is said above and in {folder / logs}. "
            "When that is mended, the same command goes on from the last checkpoint"
        )
    return True


def count_gpus(wanted: int | None) -> int:
    """How many GPUs to use; 0 for the CPU.

    Raises:
        ValueError: there are not so many.
    """
    there = torch.cuda.device_count()
    if wanted is None and there == 0:
        raise ValueError(
            "PyTorch sees no GPU (https://pytorch.org/get-started/locally/); --gpus 0 tries the task out on the CPU, "
            "where a protocol would take months"
        )
    if wanted is not None and not 0 <= wanted <= there:
        raise ValueError(f"--gpus {wanted}, but PyTorch sees {there}")
    return there if wanted is None else wanted


def require_same(path: Path, facts: Mapping[str, Any]) -> None:
    """Raises ValueError where the folder holds runs of another set-up."""
    if not path.is_file():
        return
    if changed := differences(json.loads(path.read_text(encoding="utf-8")), facts, ()):
        raise ValueError(f"{path.parent} holds runs of another set-up ({'; '.join(changed[:4])}): choose another --out")
