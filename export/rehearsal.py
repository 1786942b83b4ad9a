"""A rehearsal of a task in another framework: every part of a training, in minutes, before it starts.

An error in scoring or resuming would otherwise appear only after days of training.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from clove_hub.documents import read_json
from clove_hub.evaluation.result import write_text

REHEARSED = "rehearsed.json"
"""The file that a rehearsal writes; with the same versions it is not repeated."""
FOLDER = "rehearsal"


@dataclass(frozen=True)
class Step:
    """A process of the rehearsal."""

    what: str
    """For the message, as in `the rehearsal failed at WHAT`."""
    words: Sequence[str]
    """The arguments of Python that start it."""
    check: Callable[[str], None] = lambda printed: None
    """Takes its complete output; raises ValueError for an error that the exit status does not show."""
    advice: str = "Once that is fixed, run the same command again"


def rehearse(
    out: Path, packages: Sequence[str], prepare: Callable[[Path], Sequence[Step]], environment: Mapping[str, str]
) -> None:
    """Rehearse a training in a folder, unless it was rehearsed there with the same versions.

    Args:
        out: the folder of all seeds.
        packages: distributions whose versions matter.
        prepare: writes what the steps need into an empty folder, and returns the steps.
        environment: additional environment variables of the steps.

    Raises:
        ValueError: a step has failed. Its folder is kept, with the log.
    """
    versions = {name: _installed(name) for name in ("torch", "numpy", *packages)}
    versions["python"] = sys.version.split()[0]
    record = out / REHEARSED
    if record.is_file() and read_json(record).get("versions") == versions:
        return
    folder, began = out / FOLDER, time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print("rehearsal: two iterations, scoring, resuming, loading the result", flush=True)
    steps = prepare(folder)
    for number, step in enumerate(steps, start=1):
        log = folder / f"{number}.log"
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(
                [sys.executable, *step.words], stdout=file, stderr=file, env=os.environ | environment, check=False
            )
        printed = log.read_text(encoding="utf-8", errors="replace")
        reason = _reason(printed) if done.returncode else ""
        if not reason:
            try:
                step.check(printed)
            except ValueError as error:
                reason = str(error)
        if reason:
            raise ValueError(
                f"the rehearsal failed at {step.what}: {reason} (full output: {log}). Nothing was trained. "
                f"{step.advice}"
            )
    seconds = round(time.perf_counter() - began, 1)
    write_text(record, json.dumps({"versions": versions, "seconds": seconds}, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    print(f"rehearsal: passed ({seconds:.0f} s)", flush=True)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _reason(printed: str) -> str:
    """The line of a log that states why a process ended."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if line.split(" ")[0].endswith(("error:", "Error:"))]
    return (errors or lines or ["no output"])[-1]
