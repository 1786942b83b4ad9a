"""Signals: a run hears them, its loading workers do not, and both end when they shall."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from subprocess import PIPE

import pytest
from patience import PATIENCE

from clove_hub.processes import deaf_workers
from clove_hub.training.run.stopping import CODES, listen


@pytest.fixture(autouse=True)
def ctrl_c():
    """Where tests run in the background it is ignored, and a run leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), CODES.items())
def test_a_signal_is_remembered_and_not_obeyed_until_the_run_has_ended(number, code):
    before = [signal.getsignal(one) for one in CODES]
    with listen() as asked_to_stop:
        assert asked_to_stop() == 0
        signal.raise_signal(number)
        assert asked_to_stop() == code
        assert asked_to_stop() == code
    assert [signal.getsignal(one) for one in CODES] == before


@pytest.mark.parametrize("times", [2, 0], ids=["it was asked itself", "another process was"])
def test_a_launcher_sends_it_again_and_whoever_is_leaving_is_not_hurried(monkeypatch, times):
    monkeypatch.setenv("LOCAL_RANK", "0")
    before = [signal.getsignal(one) for one in CODES]
    with listen():
        for _ in range(times):
            signal.raise_signal(signal.SIGTERM)
    assert {signal.getsignal(one) for one in CODES} == {signal.SIG_IGN}
    for one, handler in zip(CODES, before, strict=True):
        signal.signal(one, handler)


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with listen() as asked_to_stop:
            signal.raise_signal(signal.SIGHUP)
            assert asked_to_stop() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_leaves_at_once_wherever_the_main_thread_is():
    # In a call of C no handler of Python runs, as in the wait for another process.
    program = (
        "import ctypes, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where tests run in the background
        "from clove_hub.training.run.stopping import listen\n"
        "with listen():\n"
        "    print('ready', flush=True)\n"
        "    while True: ctypes.CDLL(None).sleep(3600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=PIPE, stderr=PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert "press Ctrl-C again" in process.stderr.readline() + process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert "\nstopping at once" in process.stderr.read()  # a progress bar ends without a new line


def test_the_end_of_a_loading_worker_is_no_stop_request():
    program = (
        "import signal, time\n"
        "from clove_hub.training.run.stopping import listen\n"
        "signal.signal(signal.SIGCHLD, lambda *_: None)\n"  # as torch does for its workers
        "with listen() as asked_to_stop:\n"
        "    for number in (signal.SIGCHLD, signal.SIGTERM):\n"
        "        signal.raise_signal(number)\n"
        "        time.sleep(0.5)\n"
        "    print(asked_to_stop())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "75\n"), done.stderr


def test_a_worker_is_deaf_until_it_may_leave():
    leaving, deafen = deaf_workers()

    def work(ready):
        deafen(0)
        ready.set()
        time.sleep(PATIENCE)

    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=work, args=(ready,))
    worker.start()
    assert ready.wait(PATIENCE)
    for number in CODES:
        os.kill(worker.pid, number)
    worker.join(0.2)
    assert worker.is_alive()
    leaving.value = True
    worker.terminate()
    worker.join(PATIENCE)
    assert worker.exitcode == 0
