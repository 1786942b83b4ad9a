"""The loader of a run, with workers: its order, its errors, its silence about the random state."""

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass

import pytest
import torch
from patience import PATIENCE, until
from torch.utils.data import get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from clove_hub.training.finetune.dataset import OrderByKind
from clove_hub.training.run.loader import WorkerFailed, WorkersSilent, open_loader
from clove_hub.training.run.sampler import StepSampler


@dataclass(frozen=True)
class Squares:
    """Its items are numbers; one of them raises."""

    error: Exception | None = None

    def __getitem__(self, item: tuple[int, int]) -> int:
        if self.error is not None and item[1] == 3:
            raise self.error
        assert get_worker_info() is not None
        return item[1] ** 2


def loader(error: Exception | None = None, batch_bytes: int | None = None):
    sampler = StepSampler(OrderByKind([0] * 6, 2, seed=1), 2, 2, 0, 1, 0, 6)
    return open_loader(Squares(error), sampler, workers=2, batch_bytes=batch_bytes)


def test_batches_come_in_the_samplers_order_and_no_global_random_number_is_drawn():
    before = torch.get_rng_state()
    order = list(StepSampler(OrderByKind([0] * 6, 2, seed=1), 2, 2, 0, 1, 0, 6))
    assert list(loader()) == [[index**2 for _, index in items] for items in order]
    assert torch.equal(before, torch.get_rng_state())


def test_more_workers_than_cores_are_no_warning_of_torch(monkeypatch, recwarn):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    assert len(list(loader())) == 6
    assert [str(warning.message) for warning in recwarn] == []


class Stuck:
    """Its items never come, as on a file system that does not answer; a worker in such a call may be deaf."""

    def __getitem__(self, item: tuple[int, int]) -> int:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(PATIENCE)
        raise AssertionError


def test_workers_that_give_nothing_end_after_a_while():
    before = multiprocessing.active_children()
    sampler = StepSampler(OrderByKind([0] * 6, 2, seed=1), 2, 2, 0, 1, 0, 6)
    with pytest.raises(WorkersSilent, match=r"gave nothing for 0\.02 minutes \(run\.timeout\): check that the file"):
        next(open_loader(Stuck(), sampler, workers=2, minutes=0.02))
    until(lambda: set(multiprocessing.active_children()) <= set(before))


def test_a_value_error_of_a_worker_is_its_message_alone():
    before = multiprocessing.active_children()
    with pytest.raises(ValueError, match=r"^photo\.jpg: cannot be read\nat all$"):
        list(loader(ValueError("photo.jpg: cannot be read\nat all")))
    assert set(multiprocessing.active_children()) <= set(before)


@pytest.mark.parametrize(
    ("size", "advice"), [(None, r"2 workers wait\. .*--shm-size=8g"), (10**9, "need about 4 GB.*--shm-size=6g")]
)
def test_a_lack_of_shared_memory_names_the_size_where_it_is_known(size, advice):
    with pytest.raises(WorkerFailed, match=advice):
        list(loader(OSError(28, "No space left on device"), size))


def test_a_worker_that_dies_while_its_batch_is_fetched_is_named(monkeypatch):
    """The main process then sees a connection that is reset, perhaps before the signal that tells of the death."""

    def reset(iterator):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.kill(iterator._workers[0].pid, signal.SIGKILL)
        raise ConnectionResetError("Connection reset by peer")

    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_next_data", reset)
    with pytest.raises(
        WorkerFailed, match=r"a data-loading worker \(process \d+\) has ended, as happens when memory runs out"
    ):
        next(loader())
    signal.signal(signal.SIGCHLD, before)
