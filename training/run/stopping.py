"""Stop requests: a signal ends a run after its step; the training process's children end with it.

| signal           | meaning                                                     | exit code |
|------------------|-------------------------------------------------------------|-----------|
| SIGTERM, SIGUSR1 | a scheduler reclaims the machine: save, start again later   | 75        |
| SIGHUP           | the terminal was closed; ignored under nohup                | 75        |
| SIGINT           | Ctrl-C                                                      | 130       |

A second SIGTERM or SIGINT exits at once, with 128 + its number; the run then resumes from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TypeVar

from clove_hub.processes import STOPPED, die_with_parent

log = logging.getLogger(__name__)
T = TypeVar("T")

FINISHED = 0
INTERRUPTED = 128 + signal.SIGINT
"""The exit code after Ctrl-C: saved as well."""
CODES = {
    signal.SIGTERM: STOPPED,
    signal.SIGUSR1: STOPPED,
    signal.SIGHUP: STOPPED,
    signal.SIGINT: INTERRUPTED,
}
HURRY = (signal.SIGTERM, signal.SIGINT)
ECHO = 5.0
"""Seconds within which a second signal is a launcher's copy of the first: a terminal and torchrun both send Ctrl-C."""
LAUNCHED = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Environment variables of which a launcher sets one."""

Stop = Callable[[], int]
"""The exit code that was asked for; 0 as long as nothing was."""
StopRequests = Callable[[], contextlib.AbstractContextManager[Stop]]
"""`listen` or `never`."""


@contextlib.contextmanager
def never() -> Iterator[Stop]:
    """`listen` for a run inside another program: no signal handler is set."""
    yield lambda: FINISHED


@contextlib.contextmanager
def listen() -> Iterator[Stop]:
    """Record the signals above within the context instead of ending the process; yield the requested exit code.

    A process that a launcher started is asked to stop when its launcher dies, too.
    """
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    # Handlers of Python wait for the main thread, which may be waiting for another process: this thread does not.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # Signals that the terminal ignores stay ignored: SIGHUP under nohup, SIGINT of a script's job in the background. The
    # launcher may ignore SIGUSR1 and SIGTERM (see slurm.sh), which its processes inherit.
    terminal = (signal.SIGHUP, signal.SIGINT)
    chosen = [number for number in CODES if number not in terminal or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, remember) for number in chosen}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    hurry = threading.Thread(
        target=_leave_at_once, args=(reader, ECHO if launched() else 0), name="signals", daemon=True
    )
    hurry.start()
    if launched():
        # Not over a process between the two, such as a shell that the launcher starts and that starts Python.
        die_with_parent(signal.SIGTERM, os.getppid())
    try:
        yield lambda: CODES[signal.Signals(received[0])] if received else FINISHED
    finally:
        signal.set_wakeup_fd(wakeup)
        reader.shutdown(socket.SHUT_RDWR)  # workers that were forked hold the other end open
        hurry.join()
        writer.close()
        # A launcher sends SIGTERM to the others as soon as the first of its processes has ended, and that must not change
        # their exit codes; nor those of processes that stop because another one was asked to.
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if launched() else handler)


def until_stopped(items: Iterable[T], asked_to_stop: Stop) -> Iterator[T]:
    """Yield the items of work that is not saved: evaluation, statistics.

    Raises:
        SystemExit: a stop was requested. The newest checkpoint is from before this work, which the same command repeats.
    """
    for item in items:
        if code := asked_to_stop():
            if close := getattr(items, "close", None):
                close()  # and with it the progress bar, in whose line the message would be
            log.info("asked to stop: the last checkpoint is kept; start the run again to resume")
            raise SystemExit(code)
        yield item


def _leave_at_once(signals: socket.socket, echo: float) -> None:
    """Ends the process at a second request that comes `echo` seconds after the first, and says what is going on there."""
    first: float | None = None
    with signals:
        while received := signals.recv(16):
            for number in received:
                if number not in CODES:  # any signal with a handler of Python: torch has one for the end of a worker
                    continue
                now = time.monotonic()
                if first is None:
                    first = now
                    if number == signal.SIGINT:
                        print("\nstopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)
                elif number in HURRY and now - first >= echo:
                    print("\nstopping at once; the run resumes from its last checkpoint", file=sys.stderr)
                    os._exit(128 + number)


def launched() -> bool:
    """Whether torchrun, `accelerate launch` or mpirun started this process."""
    return any(name in os.environ for name in LAUNCHED)
