"""A DataLoader for a whole run: its workers ignore the run's signals, and its errors say what to do."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import warnings
from collections.abc import Iterator
from multiprocessing.connection import wait
from typing import Any

from torch import Generator
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from clove_hub.processes import deaf_workers

from .sampler import StepSampler

PREFETCH = 2  # batches that each worker keeps ready
ENDING = 30.0
"""Seconds in which a worker that no longer answers has ended on a busy machine; it is looked for after an error alone."""
_LACK_OF_SHARED_MEMORY = r"shared memory|bus error|no space left on device|unable to (mmap|resize file)"


class WorkerFailed(ChildProcessError):
    """A data-loading worker has ended or does not respond; the message says what to do."""


class WorkersSilent(WorkerFailed):
    """The workers are alive but return nothing."""


def open_loader(
    dataset: Any,
    sampler: StepSampler[Any],
    workers: int,
    pin_memory: bool = False,
    batch_bytes: int | None = None,
    minutes: float = 30.0,
) -> Iterator[Any]:
    """The batches of one process for a whole run, in the sampler's order.

    Workers use one thread each (set by torch) and leave the signals that end a run to the training process. The global
    random state is not changed.

    Args:
        dataset: makes a batch, or with `__getitem__` alone its parts, which come as a list.
        pin_memory: whether batches come in page-locked memory.
        batch_bytes: of one batch, where it is known, for the message about shared memory.
        minutes: timeout for a batch from the workers.

    Raises:
        ValueError: as the dataset raises it.
        WorkerFailed: a worker died, they returned nothing for too long, or lack shared memory.
    """
    leaving, prepare_worker = deaf_workers()
    with _without_advice():
        batches = DataLoader[Any](
            dataset,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            worker_init_fn=prepare_worker,
            prefetch_factor=PREFETCH if workers else None,
            timeout=60 * minutes if workers else 0,
            # Started by a fork server (Python's choice from 3.14 on), a worker's parent is that server, and it would outlive
            # a killed run.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            generator=Generator().manual_seed(0),  # the global one belongs to the model
        )
    iterator: Any = None
    try:
        with explained():
            with _without_advice():
                iterator = iter(batches)
            yield from iterator
    except WorkersSilent:
        # They may ignore any other signal, and Python waits for them at exit; torch must not raise because they die.
        signal_handling._remove_worker_pids(id(iterator))  # type: ignore[attr-defined]
        iterator._worker_pids_set = False
        for worker in iterator._workers:
            worker.kill()
        raise
    except ValueError as error:  # a worker's, which has its traceback in the text
        raise ValueError(str(error).rpartition("\nValueError: ")[2].strip()) from None
    except (RuntimeError, OSError, EOFError) as error:
        if isinstance(error, ConnectionError | EOFError) and (dead := _dead(iterator)):
            raise ended(dead) from error  # it died while a batch was read from its memory
        if not (workers and _is_lack_of_shared_memory(error)):
            raise
        needed, size = "", "8g"
        if batch_bytes is not None:
            gigabytes = batch_bytes * PREFETCH * workers / 1e9
            needed, size = f" need about {gigabytes:.2g} GB", f"{math.ceil(1.5 * gigabytes)}g"
        raise WorkerFailed(
            f"a data-loading worker ran out of shared memory (/dev/shm), where {PREFETCH} batches of each of {workers} "
            f"workers wait{' and' if needed else ''}{needed}. Start the container with --shm-size={size} (Docker gives "
            "64 MB) or --ipc=host, enlarge /dev/shm, or lower data.workers"
        ) from error
    finally:
        leaving.value = True
        if workers and iterator is not None:
            # The traceback of an error holds the iterator; collected with it, it would wait five seconds for each worker.
            iterator._shutdown_workers()


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn torch's errors about a dead or silent worker into a `WorkerFailed` within the context.

    Torch raises it wherever the training process happens to be.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if died := re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", said):
            killed = re.search(r"killed by signal: ([\w ]+)", said)
            raise ended(died[1], f"was killed ({killed[1]})" if killed else "has ended") from error
        if waited := re.match(r"DataLoader timed out after ([\d.]+) seconds", said):
            raise WorkersSilent(
                f"the data-loading workers gave nothing for {float(waited[1]) / 60:g} minutes (run.timeout): check that "
                "the file system with the images responds, or raise run.timeout"
            ) from None
        raise


def ended(processes: str, how: str = "has ended") -> WorkerFailed:
    """What is raised of a worker that is gone."""
    return WorkerFailed(
        f"a data-loading worker (process {processes}) {how}, as happens when memory runs out: lower data.workers or give the "
        "job more memory"
    )


def _dead(iterator: Any) -> str:
    """The workers that are gone, by the numbers of their processes."""
    workers = {worker.sentinel: worker for worker in getattr(iterator, "_workers", ())}
    gone = wait(list(workers), ENDING) if workers else []
    return ", ".join(str(worker.pid) for sentinel, worker in workers.items() if sentinel in gone)


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Silence torch's warning about more workers than cores, which it gives twice; a run's own names the setting."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


def _as_it_is(batch: Any) -> Any:
    return batch


def _is_lack_of_shared_memory(error: BaseException | None) -> bool:
    """Looks through the causes: torch reports a worker's death apart from the signal that it died of."""
    while error is not None:
        message = str(error)
        if "Too many open files" in message:  # torch mentions shared memory here, too, but the cure is ulimit -n
            return False
        if re.search(_LACK_OF_SHARED_MEMORY, message, re.IGNORECASE):
            return True
        error = error.__cause__
    return False
