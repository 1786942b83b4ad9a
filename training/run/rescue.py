"""Undo a failed step, so that a failure costs only that step.

A step that fails before its update is undone, and signals do not interrupt the update, so the state after the last
complete step can always be saved.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn


def untrained(module: nn.Module) -> list[Tensor]:
    """The tensors that a step changes before the optimizer: the teacher, batch norm statistics, queues."""
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    return [t.detach() for t in (*module.parameters(), *module.buffers()) if id(t) not in trained]


class Undo:
    """Restores tensors if a step fails.

    Args:
        tensors: those that change before the update; a copy of them is made at every step.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.copies = [torch.empty_like(tensor) for tensor in tensors]
        self.whole = True
        """Whether the state is that after a whole number of steps."""

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step; if it fails before the update, the tensors are restored."""
        _copy(self.tensors, self.copies)
        try:
            yield
        except BaseException:
            if self.whole:
                _copy(self.copies, self.tensors)
            raise
        self.whole = True

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """The update within a step; no signal interrupts it, and after a failure nothing can be restored."""
        with uninterrupted():
            self.whole = False
            yield


@torch.no_grad()
def _copy(tensors: list[Tensor], into: list[Tensor]) -> None:
    if tensors:
        torch._foreach_copy_(into, tensors)


@contextlib.contextmanager
def uninterrupted(*numbers: int) -> Iterator[None]:
    """Delay signal handlers that raise until the end of the context.

    Args:
        numbers: of the signals; Ctrl-C's and that of a worker that died, for which torch has a handler, by default.
    """
    if threading.current_thread() is not threading.main_thread():  # where no handler runs
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []

    def wait(number: int, frame: FrameType | None) -> None:
        waiting.append((number, frame))

    numbers = numbers or (signal.SIGINT, signal.SIGCHLD)
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number, frame in waiting:
        handlers[number](number, frame)
