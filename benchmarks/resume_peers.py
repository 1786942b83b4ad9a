"""What a kill costs: `python -m benchmarks.resume_peers --data PHOTOS [--timm-train FILE] [...]`.

Each trainer trains a small network on the same photos, once without interruption and several times killed (SIGKILL, with
all its processes) at a random moment after the first epoch and started again as its documentation says. Which photos each
step was trained on, and its loss, is seen from outside in the same way for all (see `resume_watch`).

The steps that the final weights have seen are those up to the checkpoint resumed from and those of the process that
resumed; steps between checkpoint and kill are gone with the kill and are counted apart, as work done again. Over all
epochs an uninterrupted run sees every photo equally often, so that against it

- samples repeated are those that the final weights have seen too often,
- samples lost are those that they have seen too seldom,
- steps on other samples are those whose photos differ from the same step's of the uninterrupted run, and
- the difference of the loss is that of the mean over the last epoch's steps.

The control is a second uninterrupted run, compared in the same way: not every trainer gives the same loss twice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch

from . import report, resume_watch
from .measure import Spread, spread
from .peers import (
    BACKBONE,
    BATCH,
    EPOCHS,
    SAVE_EVERY,
    SIZE,
    WHOLE,
    Trainer,
    accelerate_example,
    lightly_train,
    ours,
    timm_train,
)
from .setting import command, positive


@dataclass(frozen=True)
class Seen:
    """The photos and the loss of each step."""

    batches: list[list[str]]
    losses: list[float]
    step_seconds: float = 0.0

    def before(self, step: int) -> Seen:
        return Seen(self.batches[:step], self.losses[:step])

    def then(self, other: Seen) -> Seen:
        return Seen(self.batches + other.batches, self.losses + other.losses)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resume_peers", description="Kills and resumes our trainer and others, and compares."
    )
    parser.add_argument("--data", type=Path, required=True, metavar="PHOTOS", help="a folder of JPEG photos")
    parser.add_argument("--photos", type=int, default=80, help=f"of them, a multiple of {WHOLE} (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=5, help="of each trainer (default: %(default)s)")
    parser.add_argument(
        "--accelerate-example",
        type=Path,
        metavar="FILE",
        help="examples/complete_cv_example.py of a clone of Accelerate; with torchdata also its stateful loader",
    )
    parser.add_argument("--timm-train", type=Path, metavar="FILE", help="train.py of a clone of timm")
    parser.add_argument(
        "--lightly-train", metavar="PYTHON", help="a Python in which pip has installed lightly-train[timm]"
    )
    parser.add_argument("--results", type=Path, default=report.RESULTS, metavar="FOLDER", help="of the JSON file")
    options = parser.parse_args(given)
    positive([("--photos", options.photos), ("--kills", options.kills)])
    draw = random.Random(0)
    moments = [(draw.random(), draw.random()) for _ in range(options.kills)]  # the same for every trainer

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        classes, flat = lay_out(options.data, options.photos, work)
        trainers = [ours(classes)]
        if options.accelerate_example:
            trainers += accelerate_example(options.accelerate_example, flat, work)
        if options.timm_train:
            trainers += timm_train(options.timm_train, classes)
        if options.lightly_train:
            trainers += lightly_train(options.lightly_train, classes)
        for option in ("accelerate_example", "timm_train", "lightly_train"):
            if not getattr(options, option):
                print(f"left out: --{option.replace('_', '-')} is not given")
        rows = []
        for number, trainer in enumerate(trainers):
            print(f"{trainer.name}, saving every {trainer.saves} ...", flush=True)
            rows.append(measure(trainer, moments, work / f"runs{number}"))

    print(table(rows))
    report.save(
        "resume_peers",
        torch.device("cpu"),
        options.results,
        settings={
            "backbone": BACKBONE,
            "size": SIZE,
            "batch": BATCH,
            "epochs": EPOCHS,
            "photos": options.photos,
            "save_every": SAVE_EVERY,
            "kills": options.kills,
        },
        rows=rows,
    )


# ---- the measurement -------------------------------------------------------------------------------------------------


def lay_out(data: Path, count: int, work: Path) -> tuple[Path, Path]:
    """Copies photos spread over the data: in a folder for each of two made-up classes, and all in one folder.

    Raises:
        ValueError: there are too few, or their number does not divide into batches.
    """
    found = sorted(path for path in data.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if count % WHOLE or count > len(found):
        fitting = len(found) // WHOLE * WHOLE
        raise ValueError(
            f"--photos {count}: must be a multiple of {WHOLE}, and {data} has {len(found)} JPEG photos: "
            + (f"choose at most {fitting}" if fitting else f"give a folder of at least {WHOLE}")
        )
    classes, flat = work / "classes" / "train", work / "flat"
    for number, photo in enumerate(found[:: len(found) // count][:count]):
        label = "ab"[number % 2]
        for folder in (classes / label, flat):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(photo, folder / f"{label}_{number:04d}.jpg")
    return classes, flat


def measure(trainer: Trainer, moments: Sequence[tuple[float, float]], folder: Path) -> dict[str, Any]:
    """Runs a trainer twice to the end and once for each kill; the figures of each kill, and their spread.

    Args:
        moments: for each kill two numbers in [0, 1): which step of those after the first epoch, and when within it.
        folder: of the runs; made here.
    """
    whole, again = (finished(trainer, folder / name) for name in ("whole", "again"))
    steps = len(whole.losses)
    epoch = steps // EPOCHS
    if {len(batch) for batch in whole.batches} != {BATCH} or set(sampled(whole).values()) != {EPOCHS}:
        raise ValueError(
            f"{trainer.name} read {len(whole.batches)} batches that are not {EPOCHS} passes over its photos in batches of "
            f"{BATCH}: this version does not read as resume_watch expects"
        )
    kills: list[dict[str, Any]] = []
    for number, (which, when) in enumerate(moments):
        run, at = folder / f"kill{number}", epoch + 1 + int(which * (steps - epoch - 1))
        while (first := killed(trainer, run, at, when * whole.step_seconds)) is None:
            shutil.rmtree(run)
        step, rest, failures = resumed(trainer, run, epoch)
        kills.append(
            {"killed_in_step": len(first.losses), "resumed_after_step": step, "failures": failures}
            | compare(whole, first.before(step).then(rest), epoch)
            | {"samples_done_again": (len(first.losses) - step) * BATCH, "failed_restarts": len(failures)}
        )
        shutil.rmtree(run)
    return {
        "trainer": trainer.name,
        "version": trainer.version,
        "changes": trainer.changes,
        "saves_every": trainer.saves,
        "steps": steps,
        **{name: spread([kill[name] for kill in kills]) for name in COLUMNS},
        "control": compare(whole, again, epoch),
        "kills": kills,
    }


def compare(whole: Seen, seen: Seen, epoch: int) -> dict[str, float]:
    """What the final weights of `seen` have been trained on, against the uninterrupted run; `epoch` in steps."""
    wanted, got = sampled(whole), sampled(seen)
    return {
        "samples_repeated": (got - wanted).total(),
        "samples_lost": (wanted - got).total(),
        "steps_on_other_samples": sum(a != b for a, b in zip_longest(whole.batches, seen.batches)),
        "loss_difference": abs(statistics.fmean(seen.losses[-epoch:]) - statistics.fmean(whole.losses[-epoch:])),
    }


def sampled(seen: Seen) -> Counter[str]:
    return Counter(chain.from_iterable(seen.batches))


# ---- processes -------------------------------------------------------------------------------------------------------


def finished(trainer: Trainer, run: Path) -> Seen:
    """A run from its first step to its last.

    Raises:
        ValueError: it fails.
    """
    log = run.with_suffix(".log")
    with started(trainer, run, log) as process:
        code = process.wait()
    if code:
        raise ValueError(f"{trainer.name} ended with exit code {code}:\n{last_lines(log, 15)}")
    shutil.rmtree(run)
    return read(log)


def killed(trainer: Trainer, run: Path, at: int, wait: float) -> Seen | None:
    """A run killed `wait` seconds after its step number `at` has begun; None if it was finished by then.

    Raises:
        ValueError: it fails.
    """
    log = run.with_suffix(".log")
    log.unlink(missing_ok=True)
    with started(trainer, run, log) as process:
        while process.poll() is None and (not log.is_file() or log.read_bytes().count(b'{"loss"') < at):
            time.sleep(0.005)
        time.sleep(wait)
        code = process.poll()
    if code:
        raise ValueError(f"{trainer.name} ended with exit code {code} before its kill:\n{last_lines(log, 15)}")
    return read(log) if code is None else None


def resumed(trainer: Trainer, run: Path, epoch: int) -> tuple[int, Seen, list[str]]:
    """The rest of a killed run: the steps in the checkpoint it went on from, what followed, and failed attempts.

    A kill can leave a checkpoint that is not whole. Where the newest does not load, the one before it is tried.

    Raises:
        ValueError: none of them loads.
    """
    failures: list[str] = []
    for step, words in trainer.checkpoints(run, epoch):
        log = run.with_name(f"{run.name}_resumed{len(failures)}.log")
        with started(trainer, run, log, words) as process:
            code = process.wait()
        if not code:
            return step, read(log), failures
        failures.append(f"from step {step}: {last_lines(log, 1).replace(str(run), 'RUN')}")
    raise ValueError(f"{trainer.name} was killed and did not resume: {'; '.join(failures) or 'it left no checkpoint'}")


@contextlib.contextmanager
def started(trainer: Trainer, run: Path, log: Path, resume: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """A watched trainer as a process group of its own; what is left of it at the end of the context is killed."""
    run.parent.mkdir(parents=True, exist_ok=True)
    words = [trainer.python, str(resume_watch.__file__), str(log), str(trainer.photos), *trainer.start(run), *resume]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "LIGHTLY_TRAIN_EVENTS_DISABLED": "1",
        "LIGHTLY_TRAIN_CACHE_DIR": str(run.parent / "cache"),
    }
    with log.with_suffix(".txt").open("wb") as output:
        process = subprocess.Popen(
            words, cwd=report.ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read(log: Path) -> Seen:
    """What was seen, up to the last step that began. A trainer may have read batches ahead of it."""
    rows = [json.loads(row) for row in log.read_text().splitlines()] if log.is_file() else []
    steps = [row for row in rows if "loss" in row]
    batches = [row["batch"] for row in rows if "batch" in row][: len(steps)]
    seconds = (steps[-1]["at"] - steps[0]["at"]) / len(steps) if steps else 0.0
    return Seen(batches, [row["loss"] for row in steps], seconds)


def last_lines(log: Path, count: int) -> str:
    """Of what the process printed that left this log."""
    return "\n".join(log.with_suffix(".txt").read_text(errors="replace").splitlines()[-count:])


# ---- the table -------------------------------------------------------------------------------------------------------

COLUMNS = {
    "samples_repeated": "repeated",
    "samples_lost": "lost",
    "loss_difference": "loss differs by",
    "steps_on_other_samples": "other samples",
    "samples_done_again": "done again",
    "failed_restarts": "failed restarts",
}
"""The figures of a kill, and their heads in the table."""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(
        [
            "After a kill, against an uninterrupted run: median (smallest-largest) over the kills",
            cells("trainer", "saves every", [*COLUMNS.values(), "control's loss"]),
            *(
                cells(
                    row["trainer"],
                    row["saves_every"],
                    [*(ranged(row[name]) for name in COLUMNS), f"{row['control']['loss_difference']:.2g}"],
                )
                for row in rows
            ),
        ]
    )


def cells(trainer: str, saves: str, figures: Sequence[str]) -> str:
    return f"{trainer:36}{saves:>12}" + "".join(f"{figure:>22}" for figure in figures)


def ranged(figures: Spread) -> str:
    """`0`, or `3 (0-8)` where not all are equal."""
    low, high = figures["min"], figures["max"]
    return f"{figures['median']:.3g}" + (f" ({low:.2g}-{high:.2g})" if low != high else "")


if __name__ == "__main__":
    command(main)
