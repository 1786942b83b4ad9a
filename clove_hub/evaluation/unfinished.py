"""The saved progress of an interrupted evaluation: results of its parts and the state of its training.

Both are files in the evaluation's own folder (`kept.own_folder`), whose key identifies the evaluation.
"""

from __future__ import annotations

import errno
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from clove_hub.runs import write_whole

T = TypeVar("T")
EVERY = 10.0
"""Seconds of training after which its state is written again."""


def once(path: Path | None, work: Callable[[], T]) -> T:
    """The result of `work`, read from the file if an interrupted evaluation has left it there.

    Args:
        path: the file; without a path, nothing is saved.
        work: gives tensors, numbers, text, None, or lists, tuples and tables of these.
    """
    if path is not None and path.exists():
        kept: T = _read(path)
        return kept
    found = work()
    if path is not None:
        _write(path, found)
    return found


@dataclass
class Training:
    """A layer in training, and everything that its next step depends on except the images."""

    layer: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    written: float = field(default_factory=time.monotonic)

    def restore(self, state: dict[str, Any]) -> int:
        """Takes over what `state_in` gives; the steps that are done."""
        self.layer.load_state_dict(state["layer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        return int(state["steps"])

    def keep(self, path: Path | None, steps: int, last: bool) -> None:
        """Writes the state after so many steps, if it is time to, or the last one."""
        if path is None or not (last or time.monotonic() - self.written >= EVERY):
            return
        states = {"layer": self.layer.state_dict(), "optimizer": self.optimizer.state_dict()}
        _write(path, {"steps": steps, "generator": self.generator.get_state(), **states})
        self.written = time.monotonic()


def state_in(path: Path | None) -> dict[str, Any] | None:
    """What `Training.keep` has written last, on the CPU; None where there is nothing."""
    return _read(path) if path is not None and path.exists() else None


@contextmanager
def in_words(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else f"it cannot be used as a cache ({error.strerror or error})"
        raise ValueError(
            f"{folder}: {why}. Free some space, or set XDG_CACHE_HOME to a folder with enough; what is done so far is kept"
        ) from error


def _write(path: Path, value: Any) -> None:
    content = io.BytesIO()
    torch.save(value, content)
    with in_words(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.getvalue())


def _read(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
