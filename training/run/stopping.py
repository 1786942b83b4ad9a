"""Stop requests: SIGTERM and SIGUSR1 end a run after its step, and data-loading workers outlive them."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from ctypes import c_bool
from functools import partial
from multiprocessing.sharedctypes import RawValue
from types import FrameType

import torch
from torch import distributed as dist

FINISHED = 0
STOPPED = 75
"""The exit code after SIGTERM or SIGUSR1: saved, to be started again (EX_TEMPFAIL of sysexits.h)."""

StopRequests = Callable[[int], contextlib.AbstractContextManager[Callable[[], bool]]]
"""`listen` or `never`."""


@contextlib.contextmanager
def never(world: int) -> Iterator[Callable[[], bool]]:
    """`listen` for a run that is somebody else's program: no signal handler is set."""
    yield lambda: False


@contextlib.contextmanager
def listen(world: int) -> Iterator[Callable[[], bool]]:
    """Within the context SIGTERM and SIGUSR1 are recorded and do not end the process.

    Yields a function that returns whether any process has received one. All processes must call it together; they
    agree over the hosts' network, without a host-device synchronization.

    Args:
        world: the number of processes.
    """
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    group: dist.ProcessGroup | None = dist.new_group(backend="gloo") if world > 1 else None  # type: ignore[assignment]

    def asked_to_stop() -> bool:
        if group is not None:
            flag = torch.tensor(len(received))
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
            received.extend([0] * int(flag))
        return bool(received)

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield asked_to_stop
    finally:
        # After a stop request, later signals are ignored: a launcher sends the signal again as soon as the first process
        # has ended, and that must not change the exit code of the others.
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if received else handler)


def deaf_workers() -> tuple[c_bool, Callable[[int], None]]:
    """A flag, and what each worker of a DataLoader does first (its `worker_init_fn`).

    Launchers send the signals that end a run to all of its processes; workers must outlive the last step. When the
    loader is done or the interpreter exits, however, torch and Python themselves end them with SIGTERM and wait: that
    one must work, and the flag distinguishes the two. It is set when the interpreter exits, too.
    """
    leaving = RawValue(c_bool, False)
    atexit.register(setattr, leaving, "value", True)
    return leaving, partial(_deafen, leaving)


def _deafen(leaving: c_bool, worker: int) -> None:
    for name in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.value else None)
