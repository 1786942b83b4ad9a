"""Work in processes of its own: several beside each other, or what could take the device down with it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .place import Place


class ChildFailed(Exception):
    """What it says is the child's own error."""


class Children:
    """Starts functions of `child.FUNCTIONS` and fetches what they return; those that still run at the end are ended."""

    def __init__(self, place: Place) -> None:
        self.place, self.started = place, dict[str, tuple["subprocess.Popen[bytes]", Path]]()

    def __enter__(self) -> Children:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process, _ in self.started.values():
            if process.poll() is None:
                process.kill()
                process.wait()

    def start(self, name: str, function: str, **arguments: Any) -> None:
        folder = self.place.work / "children"
        folder.mkdir(parents=True, exist_ok=True)
        out = folder / f"{name.replace(' ', '_').replace(',', '')}_{os.getpid()}.json"
        place = {
            key: value and str(value) for key, value in dataclasses.asdict(self.place).items() if key != "rehearse"
        }
        order = {"function": function, "arguments": arguments, "place": place, "rehearse": self.place.rehearse}
        threads = {} if self.place.rehearse else {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
        with out.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.child", json.dumps(order), str(out)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | threads,
                cwd=Path(__file__).parents[2],
            )
        self.started[name] = process, out

    def result(self, name: str, seconds: float) -> Any:
        """What it returned.

        Raises:
            ChildFailed: it raised, or ended otherwise.
            TimeoutError: it is not done after so many seconds.
        """
        process, out = self.started[name]
        until = time.monotonic() + max(seconds, 0.1)
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        if process.poll() is None:
            raise TimeoutError(f"not done after {seconds:.0f} seconds")
        said = out.with_suffix(".log").read_text(errors="replace")[-1500:]
        if not out.is_file():
            raise ChildFailed(f"the process ended with exit code {process.returncode}; it said last: {said}")
        found = json.loads(out.read_text())
        if "error" in found:
            raise ChildFailed(f"{found['error']}\n{found['traceback']}\nit said last: {said}")
        return found["result"]


def place_from(order: dict[str, Any]) -> Place:
    found = {key: value and Path(value) for key, value in order["place"].items() if key != "device"}
    return Place(torch.device(order["place"]["device"]), order["rehearse"], **found)
