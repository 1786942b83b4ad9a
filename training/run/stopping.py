"""Stop requests: a signal ends a run after its step; the training process's children end with it.

| signal           | meaning                                                     | exit code |
|------------------|-------------------------------------------------------------|-----------|
| SIGTERM, SIGUSR1 | a scheduler wants the machine back: save, start again later | 75        |
| SIGHUP           | the terminal was closed; ignored under nohup                | 75        |
| SIGINT           | Ctrl-C                                                      | 130       |

A second SIGTERM or SIGINT leaves at once, with 128 + its number; the run then goes on from its last checkpoint.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from ctypes import c_bool
from functools import partial
from multiprocessing.sharedctypes import RawValue
from types import FrameType

FINISHED = 0
STOPPED = 75
"""The exit code after a scheduler's signal: saved, to be started again (EX_TEMPFAIL of sysexits.h)."""
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
PR_SET_PDEATHSIG = 1

Stop = Callable[[], int]
"""The exit code that was asked for; 0 as long as nothing was."""
StopRequests = Callable[[], contextlib.AbstractContextManager[Stop]]
"""`listen` or `never`."""


@contextlib.contextmanager
def never() -> Iterator[Stop]:
    """`listen` for a run that is somebody else's program: no signal handler is set."""
    yield lambda: FINISHED


@contextlib.contextmanager
def listen() -> Iterator[Stop]:
    """Within the context the signals above are recorded and do not end the process; yields what was asked for.

    A process that a launcher started is asked to stop when its launcher dies, too.
    """
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    # Handlers of Python wait for the main thread, which may be waiting for another process: this thread does not.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    # What a terminal's user has ignored stays ignored: SIGHUP under nohup, SIGINT of a script's job in the background. Of
    # SIGUSR1 and SIGTERM the launcher may be deaf (see slurm.sh), and its processes inherit that.
    terminal = (signal.SIGHUP, signal.SIGINT)
    chosen = [number for number in CODES if number not in terminal or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, remember) for number in chosen}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    hurry = threading.Thread(
        target=_leave_at_once, args=(reader, ECHO if launched() else 0), name="signals", daemon=True
    )
    hurry.start()
    if launched():
        end_with_parent(signal.SIGTERM, os.getppid())
    try:
        yield lambda: CODES[signal.Signals(received[0])] if received else FINISHED
    finally:
        signal.set_wakeup_fd(wakeup)
        reader.shutdown(socket.SHUT_RDWR)  # workers that were forked hold the other end open
        hurry.join()
        writer.close()
        # A launcher sends the signal again as soon as the first of its processes has ended, and that must not change the
        # exit code of the others.
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if received and launched() else handler)


def _leave_at_once(signals: socket.socket, echo: float) -> None:
    """Ends the process at a second request that comes `echo` seconds after the first, and says what is going on there."""
    first: float | None = None
    with signals:
        while received := signals.recv(16):
            for number in received:
                now = time.monotonic()
                if first is None:
                    first = now
                    if number == signal.SIGINT:
                        print("\nstopping after this step; Ctrl-C once more leaves at once", file=sys.stderr)
                elif number in HURRY and now - first >= echo:
                    print("leaving at once; the run goes on from its last checkpoint", file=sys.stderr)
                    os._exit(128 + number)


def launched() -> bool:
    """Whether torchrun, `accelerate launch` or mpirun started this process."""
    return any(name in os.environ for name in LAUNCHED)


def end_with_parent(number: int, parent: int) -> None:
    """Has Linux send this process a signal when its parent dies; elsewhere nothing.

    It cannot reach over a process between the two, such as a shell that the launcher starts and that starts Python.

    Args:
        number: the signal.
        parent: its process number, in case it has died already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:
            os.kill(os.getpid(), number)


def deaf_workers() -> tuple[c_bool, Callable[[int], None]]:
    """A flag, and what each worker of a DataLoader does first (its `worker_init_fn`).

    Launchers send the signals that end a run to all of its processes; workers must outlive the last step. When the
    loader is done or the interpreter exits, however, torch and Python themselves end them with SIGTERM and wait: that
    one must work, and the flag distinguishes the two. It is set when the interpreter exits, too.
    """
    leaving = RawValue(c_bool, False)
    atexit.register(setattr, leaving, "value", True)
    return leaving, partial(_deafen, leaving, os.getpid())


def _deafen(leaving: c_bool, parent: int, worker: int) -> None:
    signal.set_wakeup_fd(-1)  # the parent's
    end_with_parent(signal.SIGKILL, parent)
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.value or os.getppid() != parent else None)
