"""Ending processes together: a child with its parent, DataLoader workers after the run that reads from them."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing.sharedctypes import RawValue
from multiprocessing.util import Finalize

STOPPED = 75
"""The exit code of a run that a signal stopped: saved, to be started again (EX_TEMPFAIL of sysexits.h)."""
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1


def die_with_parent(number: signal.Signals, parent: int) -> None:
    """Send this process a signal when its parent ends in any way. Only on Linux; elsewhere nothing happens.

    Args:
        parent: its process id; it may have ended already.
    """
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:
            os.kill(os.getpid(), number)


def deaf_workers() -> tuple[ctypes.c_bool, Callable[[int], None]]:
    """A flag, and what each worker of a DataLoader does first (its `worker_init_fn`).

    Launchers send the signals that end a run to all of its processes; workers must outlive the last step. When the
    loader is done or the interpreter exits, however, torch and Python themselves end them with SIGTERM and wait: that
    one must work, and the flag distinguishes the two. It is set when the interpreter exits, too. Workers end with the
    process that started them.
    """
    leaving = RawValue(ctypes.c_bool, False)
    Finalize(None, setattr, (leaving, "value", True), exitpriority=0)  # unlike atexit's, run in child processes, too
    return leaving, partial(_deafen, leaving, os.getpid())


def _deafen(leaving: ctypes.c_bool, parent: int, worker: int) -> None:
    signal.set_wakeup_fd(-1)  # the parent's
    die_with_parent(signal.SIGKILL, parent)
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.value or os.getppid() != parent else None)
