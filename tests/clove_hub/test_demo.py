"""`clove-hub demo` is interrupted; tests/test_documentation.py runs it to its end."""

import os
import signal
import subprocess
import sys

import pytest
from patience import PATIENCE, until
from training_runs import last_checkpoint, overrides

from clove_hub.processes import STOPPED


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process does not end with its parent")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_the_command_that_is_running_saves_and_ends_with_the_demo(made_photos, tmp_path, number, code):
    for name in ("skimage", "pycocotools", "torchvision"):
        pytest.importorskip(name)
    run = tmp_path / "demo" / "run"
    small = [
        word for word in overrides("", "", schedule__steps=10_000) if not word.startswith(("data.path", "run.out"))
    ]
    words = ["demo", "--out", str(tmp_path / "demo"), "--data", str(made_photos), *small]
    process = subprocess.Popen(
        [sys.executable, "-m", "clove_hub.cli", *words],
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )
    until(lambda: (run / "metrics.jsonl").is_file() or process.poll() is not None)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    assert process.wait(PATIENCE) == code
    until(lambda: not (run / "lock.json").exists())
    assert last_checkpoint(run).is_dir()


def test_a_stopped_command_gives_its_exit_code():
    from clove_hub.demo.command import started

    assert started([sys.executable, "-c", f"raise SystemExit({STOPPED})"]) == STOPPED
