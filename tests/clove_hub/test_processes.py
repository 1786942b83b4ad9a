"""A child ends with its parent, and workers of a DataLoader outlive what ends the run, but not the run."""

import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE, until

WAITING = """
import os, signal, sys, time
from clove_hub.processes import die_with_parent
die_with_parent(signal.SIGTERM, int(sys.argv[1]) or os.getppid())
print(os.getpid(), flush=True)
time.sleep(1800)
"""
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {WAITING!r}, "0"], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline(), flush=True)
child.wait()
"""
LOADING = """
import os, signal
from torch.utils.data import DataLoader
from clove_hub.processes import STOPS, deaf_workers

if __name__ == "__main__":
    loader = iter(DataLoader(range(1000), num_workers=2, worker_init_fn=deaf_workers()[1]))
    read = [int(next(loader)) for _ in range(10)]  # both workers have begun
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
        os.killpg(0, number)
    read += [int(next(loader)) for _ in range(100)]
    assert read == list(range(110))
    print("read", flush=True)
    raise RuntimeError("the loader is still in use")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_child_gets_its_signal_when_its_parent_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = Path("/proc", parent.stdout.readline().strip())
        assert child.name.isdigit()
        assert child.exists()
        parent.kill()
    until(lambda: ended(child))


def ended(process: Path) -> bool:
    try:
        return "\nState:\tZ" in (process / "status").read_text()  # nobody may ask for its exit code
    except OSError:
        return True


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_child_whose_parent_has_ended_before_gets_it_too() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    child = subprocess.run(
        [sys.executable, "-c", WAITING, str(gone.pid)], capture_output=True, text=True, timeout=PATIENCE
    )
    assert child.returncode == -15


def test_workers_outlive_signals_to_all_processes_and_end_with_a_run_that_fails() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADING],
        capture_output=True,  # until all that hold the pipes have ended
        text=True,
        timeout=PATIENCE,
        start_new_session=True,
    )
    assert done.stdout == "read\n", done.stderr
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "RuntimeError: the loader is still in use"
