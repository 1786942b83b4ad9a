"""Signals: a run hears them, its loading workers do not, and both end when they shall."""

import multiprocessing
import os
import signal
import time

import pytest
from patience import PATIENCE

from clove_hub.training.run.stopping import deaf_workers, listen

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_and_not_obeyed_until_the_run_has_ended(number):
    before = [signal.getsignal(one) for one in SIGNALS]
    with listen(world=1) as asked_to_stop:
        assert not asked_to_stop()
        signal.raise_signal(number)
        assert asked_to_stop()
        assert asked_to_stop()
    # A launcher sends it again: whoever is leaving is not hurried.
    assert [signal.getsignal(one) for one in SIGNALS] == [signal.SIG_IGN] * 2
    for one, handler in zip(SIGNALS, before, strict=True):
        signal.signal(one, handler)


def test_what_the_signals_did_before_they_do_again():
    before = [signal.getsignal(one) for one in SIGNALS]
    with listen(world=1):
        assert [signal.getsignal(one) for one in SIGNALS] != before
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_a_worker_is_deaf_until_it_may_leave():
    leaving, deafen = deaf_workers()

    def work(ready):
        deafen(0)
        ready.set()
        time.sleep(60)

    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=work, args=(ready,))
    worker.start()
    assert ready.wait(30)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(worker.pid, number)
    worker.join(0.2)
    assert worker.is_alive()
    leaving.value = True
    worker.terminate()
    worker.join(PATIENCE)
    assert worker.exitcode == 0
