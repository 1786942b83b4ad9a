"""Memory and cores of this host for the processes of a run, according to the system and its control groups."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

MOST_WORKERS = 16
"""Five cores decode for a GPU that trains on 1000 images a second; each further worker keeps two batches in memory."""


def local_processes() -> int:
    """The processes of the run on this host, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


# ---- memory ----------------------------------------------------------------------------------------------------------


def available_memory(root: Path = Path("/")) -> int:
    """Bytes still available to this process: the smaller of the system's and its control groups'."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = min(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([free, *_group_limits(root)])


def _group_limits(root: Path) -> Iterator[int]:
    """What is left below the memory limit of this process's control group and of those around it."""
    for unified, folder in _groups(root, "memory"):
        limit, usage, idle = (
            ("memory.max", "memory.current", "inactive_file")
            if unified
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        try:
            most = int((folder / limit).read_text())  # "max" where there is none
            used = int((folder / usage).read_text())
            counts = dict(pair.split() for pair in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        yield max(0, most - used + int(counts.get(idle, 0)))  # cached files can be evicted


def peak_memory() -> int:
    """Peak memory of this process in bytes, since its start or since `forget_peak`."""
    return _status("VmHWM")


def held_memory() -> int:
    """Bytes that this process holds now; where the system does not say, the most that it has held."""
    return _status("VmRSS")


def _status(name: str) -> int:
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def trim() -> None:
    """Return freed memory to the system if the C library (glibc) keeps it."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)


def forget_peak() -> None:
    """Reset `peak_memory` if the system supports it (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# ---- cores -----------------------------------------------------------------------------------------------------------


def own_cores() -> frozenset[int]:
    """The cores on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def core_quota(root: Path = Path("/")) -> float:
    """The processor time that the control groups of this process leave it, in cores; infinite where there is no limit."""
    quotas = [math.inf]
    for unified, folder in _groups(root, "cpu"):
        try:
            if unified:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if float(quota) > 0:  # "max", or -1 in version 1, where there is no limit
                quotas.append(float(quota) / float(period))
        except (OSError, ValueError):
            continue
    return min(quotas)


def share_of_cores(own: frozenset[int], everyone: Sequence[frozenset[int]], quota: float) -> float:
    """The cores for one of the processes on a host; cores that several may use are divided.

    Args:
        own: on which it may run.
        everyone: the same of all processes of the run on this host, this one's too.
        quota: of all of them together.
    """
    share = sum(1 / sum(core in other for other in everyone) for core in own)
    return min(share, quota / len(everyone))


def default_workers(share: float) -> int:
    """Data-loading workers for a process with `share` cores, one of which it needs itself."""
    return max(1, min(MOST_WORKERS, math.floor(share + 1e-6) - 1))


# ---- control groups --------------------------------------------------------------------------------------------------


def _groups(root: Path, controller: str) -> Iterator[tuple[bool, Path]]:
    """The folders of this process's control group and of those around it, and whether they are of version 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            unified, base = True, root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            unified, base = False, root / "sys/fs/cgroup" / controller
        else:
            continue
        # Inside a container the path may be the host's, of which only the top is visible here.
        path = Path(group.lstrip("/"))
        for folder in {base / part for part in (path, *path.parents)}:
            yield unified, folder
