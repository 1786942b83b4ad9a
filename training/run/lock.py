"""One writer for a run: RUN/lock.json names its process and host, and is renewed while that process lives.

On one host, the operating system's lock on the file decides: it ends with its holder, however that ended. The lock may
not work across hosts on a network file system; there a run counts as alive as long as the file changes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

NAME = "lock.json"
BEAT = 15.0
"""Seconds between two changes of the file by its holder."""
SILENCE = 60.0
"""Seconds without a change after which a holder on another host counts as dead."""
CHILDREN = 10.0
"""Seconds for the children of a holder that was killed: they hold its lock until they have ended too."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of file systems without locks."""


class Lock:
    """The right to write into a run's folder, from the constructor to `release`.

    Args:
        run: the folder, which exists.

    Raises:
        BlockingIOError: another process has it; the message says which.
        OSError: the file cannot be written.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.file, self.sure = self._opened()
        self.beats = 0
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.holder = {"host": socket.gethostname(), "process": os.getpid(), "since": now}
        try:
            self._take()
        except BaseException:
            os.close(self.file)
            raise
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._live, name="run lock", daemon=True)
        self.thread.start()

    @property
    def path(self) -> Path:
        """The file; `run` follows a folder that is moved."""
        return self.run / NAME

    def release(self) -> None:
        """Release the lock; the file is removed if it is still this process's."""
        self.ended.set()
        self.thread.join()
        if self.problem() is None:
            with contextlib.suppress(OSError):
                self.path.unlink()
        os.close(self.file)

    def problem(self) -> str | None:
        """Why this process may no longer write, or None."""
        now = self.whereabouts()
        if now is None:
            return f"{self.run} was deleted while the run was writing into it"
        if now != self.run:
            return f"{self.run} was moved to {now} while the run was writing into it"
        holder = _content(self.file)
        if holder and not self._is_own(holder):
            return f"{_named(holder)} took over {self.run}, because this process had stopped updating {NAME}"
        return None

    def whereabouts(self) -> Path | None:
        """The current path of the run's folder: `run` unless it was moved; None if it is gone."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self.file)):
                return self.run
        with contextlib.suppress(OSError):  # Linux has the name of an open file
            moved = Path(os.readlink(f"/proc/self/fd/{self.file}"))
            if moved.name == NAME and os.path.samestat(os.stat(moved), os.fstat(self.file)):
                return moved.parent
        return None

    def _opened(self) -> tuple[int, bool]:
        """The file, once nobody on this host has the system's lock on it; and whether there are such locks here."""
        until = time.monotonic() + CHILDREN
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in NO_LOCKS:
                    return file, False
                holder = _content(file)
                os.close(file)
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                if not _died_here(holder) or time.monotonic() > until:
                    raise _held(self.run, holder) from None
                time.sleep(0.1)
                continue
            with contextlib.suppress(FileNotFoundError):  # its holder may just have removed it
                if os.path.samestat(os.stat(self.path), os.fstat(file)):
                    return file, True
            os.close(file)

    def _take(self) -> None:
        """Writes this process's name into the file, once whoever stands in it is known to be dead."""
        before = _content(self.file)
        if before and before.get("host") == self.holder["host"]:
            if not self.sure and not _died_here(before):
                raise _held(self.run, before)
            log.warning("%s was left locked by %s, which has ended: taking over", self.run, _named(before))
        elif before:
            log.warning(
                "%s is locked by %s. Waiting %.0f seconds for an update of the lock, as this host cannot see that process",
                *(self.run, _named(before), SILENCE),
            )
            until = time.monotonic() + SILENCE
            while time.monotonic() < until:
                time.sleep(min(1.0, SILENCE / 10))
                now = _read(self.path)
                if now != before and now:
                    raise _held(self.run, now)
            log.warning("the lock was not updated: taking over")
        self._beat()

    def _live(self) -> None:
        while not self.ended.wait(BEAT):
            with contextlib.suppress(OSError):
                if self.problem() is None:
                    self._beat()

    def _beat(self) -> None:
        self.beats += 1
        content = json.dumps(self.holder | {"beat": self.beats}).encode() + b"\n"
        os.pwrite(self.file, content, 0)
        os.ftruncate(self.file, len(content))

    def _is_own(self, holder: dict[str, Any]) -> bool:
        return {key: holder.get(key) for key in self.holder} == self.holder


def _read(path: Path) -> dict[str, Any]:
    """The content by name, as another host sees it: an open file may be cached there."""
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDONLY)
        try:
            return _content(file)
        finally:
            os.close(file)
    return {}


def _content(file: int) -> dict[str, Any]:
    """What the file says; nothing where it is empty or just being written."""
    try:
        found = json.loads(os.pread(file, 4096, 0))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _died_here(holder: dict[str, Any]) -> bool:
    """Whether it was a process of this host that has ended."""
    process = holder.get("process")
    if holder.get("host") != socket.gethostname() or not isinstance(process, int) or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder.get('process', '?')} on {holder.get('host', '?')} (since {holder.get('since', '?')})"


def _held(run: Path, holder: dict[str, Any]) -> BlockingIOError:
    return BlockingIOError(
        f"{run} is being written by {_named(holder)}: wait until it ends, or end it and start again; another run needs "
        "another folder"
    )
