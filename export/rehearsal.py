"""A rehearsal of a task in another framework: everything that a training needs, in minutes, before it begins.

What fails in scoring or in going on would otherwise show when days are spent.
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
"""What a rehearsal leaves; with the same versions it is not repeated."""
FOLDER = "rehearsal"


@dataclass(frozen=True)
class Step:
    """A process of the rehearsal."""

    what: str
    """For the message, as in `the rehearsal failed at WHAT`."""
    words: Sequence[str]
    """The arguments of Python that start it."""
    check: Callable[[str], None] = lambda printed: None
    """Takes all that it printed; raises ValueError where something is wrong all the same."""
    advice: str = "When that is mended, give the same command again"


def rehearse(
    out: Path, packages: Sequence[str], prepare: Callable[[Path], Sequence[Step]], environment: Mapping[str, str]
) -> None:
    """Rehearses what is trained in a folder, unless it was rehearsed there with the same versions.

    Args:
        out: the folder of all seeds.
        packages: distributions whose versions matter.
        prepare: writes what the steps need into an empty folder, and gives the steps.
        environment: variables that the steps have beside this process's.

    Raises:
        ValueError: a step has failed. Its folder stays, with the log.
    """
    versions = {name: _installed(name) for name in ("torch", "numpy", *packages)}
    versions["python"] = sys.version.split()[0]
    record = out / REHEARSED
    if record.is_file() and read_json(record).get("versions") == versions:
        return
    folder, began = out / FOLDER, time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print("rehearsal: two iterations, scoring, going on, opening the result", flush=True)
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
                f"the rehearsal failed at {step.what}: {reason} (all of it is in {log}). Nothing was trained. "
                f"{step.advice}"
            )
    seconds = round(time.perf_counter() - began, 1)
    write_text(record, json.dumps({"versions": versions, "seconds": seconds}, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    print(f"rehearsal: all of it works ({seconds:.0f} s)", flush=True)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _reason(printed: str) -> str:
    """The line of a log that says why a process has ended."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if line.split(" ")[0].endswith(("error:", "Error:"))]
    return (errors or lines or ["it ended without a word"])[-1]
