"""What a part leaves: a JSON file that is written anew after every item, so that a call that is cut off loses nothing.

An item that fails, hangs or has no time left is recorded as such, and the next one begins.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from clove_hub.global_state import kept_generators
from clove_hub.runs import write_whole

from ..report import rounded

DEVICE_LOST = 3
"""The exit code of a part whose CUDA context is broken: another process can go on with the next item."""
LEAST = 5.0
"""Seconds that must be left for an item to begin."""


class OutOfTime(BaseException):
    """An item takes longer than it may. No `Exception`, so that no code under test takes it for one of its own."""


class Journal:
    """The items of a part.

    Args:
        path: of the JSON file; items that it has already are not done again.
        minutes: after which no item begins, and the one at work ends.
        patience: times the limit that an item has.
        about: what the file says besides.
    """

    def __init__(self, path: Path, minutes: float, patience: float = 1.0, **about: Any) -> None:
        self.path, self.until, self.patience = path, time.monotonic() + 60 * minutes, patience
        found = json.loads(path.read_text()) if path.is_file() else {}
        self.items: dict[str, dict[str, Any]] = found.get("items", {})
        self.about = about
        self.write()

    @property
    def left(self) -> float:
        """Seconds."""
        return max(self.until - time.monotonic(), 0.0)

    def item(self, name: str, work: Callable[[], Any], limit: float = 60.0, least: float = LEAST) -> Any:
        """Does an item and records what it returns, or why it does not; returns that, or None.

        Args:
            limit: seconds after which it is broken off.
            least: seconds without which it does not begin.
        """
        if name in self.items:
            return self.items[name].get("result")
        if self.left < least:
            self.note(name, {"ok": None, "error": f"{self.left:.0f} seconds were left, {least:.0f} are needed"})
            return None
        self.items[name] = {"ok": False, "error": "the process ended within this item"}
        self.write()
        began, entry = time.perf_counter(), {}
        try:
            with kept_generators(), within(min(self.patience * limit, self.left)):
                entry = {"ok": True, "result": work()}
        except (Exception, OutOfTime, SystemExit) as error:
            entry = {"ok": False, **told(error)}
        entry["seconds"] = time.perf_counter() - began
        self.note(name, entry)
        if not entry["ok"]:
            release(self)
        return entry.get("result")

    def note(self, name: str, entry: dict[str, Any]) -> None:
        """Records an item that something else has done."""
        self.items[name] = rounded(entry)
        self.write()
        state = {True: "ok", False: "FAILED", None: "left out"}[entry["ok"]]
        said = entry.get("error") or json.dumps(self.items[name].get("result"), default=str)
        print(f"{state:<8} {entry.get('seconds', 0.0):6.1f} s  {name}: {said:.300}", flush=True)

    def write(self) -> None:
        record = {**self.about, "items": self.items}
        write_whole(self.path, json.dumps(record, indent=1, default=str) + "\n")


def told(error: BaseException) -> dict[str, str]:
    """What is recorded of an error: its last line, and where it came from."""
    last = (traceback.format_exception_only(type(error), error)[-1]).strip()
    return {"error": f"{type(error).__name__}: {error}"[:2000] or last, "traceback": traceback.format_exc()[-4000:]}


def release(journal: Journal) -> None:
    """Gives back the memory of an item that failed; ends the process where the device does not answer any more."""
    gc.collect()
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"the device is lost to this process: {error}", flush=True)
        journal.write()
        sys.exit(DEVICE_LOST)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in what takes longer, and once more every five seconds where somebody catches it."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"not done after {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(math.ceil(seconds), 1), 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
