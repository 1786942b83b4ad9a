"""Work in processes of its own: several beside each other, or what could take the device down with it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from clove_hub.global_state import kept_environment
from clove_hub.processes import die_with_parent
from clove_hub.runs import write_whole
from clove_hub.training.pretrain import own_accelerator

from .journal import told
from .place import Place


def processes(rehearse: bool) -> ForkContext | SpawnContext:
    """How a process is started: fresh on a GPU, whose context survives no fork; forked in a rehearsal, which saves its imports."""
    return multiprocessing.get_context("fork") if rehearse else multiprocessing.get_context("spawn")


class ChildFailed(Exception):
    """What it says is the child's own error."""


class Children:
    """Starts functions, which take the place first, and fetches what they return; those that still run at the end are ended."""

    def __init__(self, place: Place) -> None:
        self.place, self.started = place, dict[str, tuple[BaseProcess, Path]]()

    def __enter__(self) -> Children:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process, _ in self.started.values():
            process.kill()
            process.join()

    def start(self, name: str, function: Callable[..., Any], /, **arguments: Any) -> None:
        folder = self.place.work / "children"
        folder.mkdir(parents=True, exist_ok=True)
        out = folder / f"{name.replace(' ', '_').replace(',', '')}_{os.getpid()}.json"
        out.unlink(missing_ok=True)
        order = {"function": function, "arguments": arguments, "out": out, "parent": os.getpid()}
        process = processes(self.place.rehearse).Process(target=carry_out, args=(self.place, order))
        with kept_environment():
            os.environ["OMP_NUM_THREADS"] = "1"
            if not self.place.rehearse:
                os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "2"
            process.start()
        self.started[name] = process, out

    def result(self, name: str, seconds: float) -> Any:
        """What it returned.

        Raises:
            ChildFailed: it raised, or ended otherwise.
            TimeoutError: it is not done after so many seconds.
        """
        process, out = self.started[name]
        until = time.monotonic() + max(seconds, 0.1)
        while process.is_alive() and time.monotonic() < until:  # in short waits, which a signal ends
            process.join(0.1)
        if process.is_alive():
            raise TimeoutError(f"not done after {seconds:.0f} seconds")
        log = out.with_suffix(".log")
        said = log.read_text(errors="replace")[-1500:] if log.is_file() else ""
        if not out.is_file():
            raise ChildFailed(f"the process ended with exit code {process.exitcode}; it said last: {said}")
        found = json.loads(out.read_text())
        if "error" in found:
            raise ChildFailed(f"{found['error']}\n{found['traceback']}\nit said last: {said}")
        return found["result"]


def carry_out(place: Place, order: dict[str, Any]) -> None:
    """Carries out an order of `Children.start`; what is printed goes to a file beside the result's."""
    die_with_parent(signal.SIGKILL, order["parent"])
    out: Path = order["out"]
    with out.with_suffix(".log").open("wb") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    logging.basicConfig(level=logging.INFO, force=True)
    if place.rehearse:
        torch.set_num_threads(1)  # makes torch's pool anew after a fork, which threads would do at once, and fail
    try:
        with own_accelerator():  # whatever a forked process has brought along
            found: dict[str, Any] = {"result": order["function"](place, **order["arguments"])}
    except Exception as error:
        found = dict(told(error))
    write_whole(out, json.dumps(found, default=str))
