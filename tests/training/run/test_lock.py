"""One writer for a run: who holds its folder, and how that is known to have ended."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time

import pytest
from patience import PATIENCE, until

from clove_hub.training.run import lock as module
from clove_hub.training.run.lock import NAME, Lock


def hold(run, ready):
    lock = Lock(run)
    ready.set()
    time.sleep(PATIENCE)
    lock.release()


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(PATIENCE)
    yield process
    process.kill()
    process.join()


def test_a_second_process_is_told_who_holds_the_folder(holder, tmp_path):
    with pytest.raises(BlockingIOError, match=rf"process {holder.pid} on {socket.gethostname()} \(since 20"):
        Lock(tmp_path)
    assert json.loads((tmp_path / NAME).read_text())["process"] == holder.pid


def test_a_holder_that_was_killed_is_noticed_at_once(holder, tmp_path, caplog):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    Lock(tmp_path).release()
    assert f"was left locked by process {holder.pid}" in caplog.text
    assert not (tmp_path / NAME).exists()


def left_by_another_host(run):
    (run / NAME).write_text(json.dumps({"host": "node7", "process": 12, "since": "2026-01-01", "beat": 3}))


def test_a_holder_on_another_host_counts_as_dead_after_a_silence(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "SILENCE", 0.3)
    left_by_another_host(tmp_path)
    Lock(tmp_path).release()
    assert "process 12 on node7" in caplog.text
    assert "was not updated: taking over" in caplog.text


def test_a_holder_on_another_host_that_gives_a_sign_of_life_keeps_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SILENCE", PATIENCE)
    left_by_another_host(tmp_path)
    beat = {"host": "node7", "process": 12, "since": "2026-01-01", "beat": 4}
    timer = threading.Timer(0.5, lambda: (tmp_path / NAME).write_text(json.dumps(beat)))
    timer.start()
    with pytest.raises(BlockingIOError, match="process 12 on node7"):
        Lock(tmp_path)
    timer.join()


def test_the_file_changes_while_its_holder_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.01)
    lock = Lock(tmp_path)
    first = (tmp_path / NAME).read_text()
    until(lambda: (tmp_path / NAME).read_text() not in (first, ""))
    lock.release()


def test_without_locks_of_the_file_system_a_living_process_of_this_host_is_still_noticed(holder, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(module.NO_LOCKS[0], "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", no_locks)
    with pytest.raises(BlockingIOError, match=f"process {holder.pid}"):
        Lock(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    Lock(tmp_path).release()


def test_a_folder_that_is_moved_deleted_or_taken_over_is_noticed(tmp_path):
    for name in ("moved", "deleted", "taken"):
        (tmp_path / name).mkdir()
    moved, deleted, taken = (Lock(tmp_path / name) for name in ("moved", "deleted", "taken"))
    assert moved.problem() is None
    (tmp_path / "moved").rename(tmp_path / "elsewhere")
    assert f"was moved to {tmp_path / 'elsewhere'}" in moved.problem()
    shutil.rmtree(tmp_path / "deleted")
    assert "was deleted" in deleted.problem()
    left_by_another_host(tmp_path / "taken")
    assert "process 12 on node7 (since 2026-01-01) took over" in taken.problem()
    for lock in (moved, deleted, taken):
        lock.release()
    assert (tmp_path / "taken" / NAME).exists()  # it is the other one's
