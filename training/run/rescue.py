"""What a failure costs: nothing before the step that it came in.

A step is undone where it fails before its update, and signals do not interrupt the update; so the state after the last
whole step can be saved whatever happens.
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
    """What a step changes before the optimizer does: the teacher, statistics of batch norm, queues."""
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    return [t.detach() for t in (*module.parameters(), *module.buffers()) if id(t) not in trained]


class Undo:
    """Puts tensors back where a step fails.

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
        """A step: where it fails before the update, the tensors are as they were."""
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
        """The update within a step: no signal interrupts it, and where it fails nothing can be put back."""
        with uninterrupted():
            self.whole = False
            yield


@torch.no_grad()
def _copy(tensors: list[Tensor], into: list[Tensor]) -> None:
    if tensors:
        torch._foreach_copy_(into, tensors)


@contextlib.contextmanager
def uninterrupted(*numbers: int) -> Iterator[None]:
    """Within the context handlers that raise wait for its end.

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
