"""The SLURM script, with stand-ins for SLURM's commands and a real run of a tiny network."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from patience import PATIENCE
from training_runs import overrides

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS = {"schedule__steps": 100_000, "run__save_every": 100_000, "run__log_every": 1}

STAND_INS = {
    "srun": 'shift\necho $$ > step.pid\nexec "$@"',
    # All processes of the step, as SLURM does, however many sessions they make.
    "scancel": f"""{sys.executable} - <<'END'
import psutil
step = psutil.Process(int(open("step.pid").read()))
for process in (step, *step.children(recursive=True)):
    process.send_signal(10)
END""",
    "scontrol": 'if [ "$1" = requeue ]; then echo "$2" > requeued; else echo localhost; fi',
}


@pytest.fixture
def cluster(tmp_path) -> Path:
    """A folder to work in with SLURM's commands."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    return tmp_path


def submit(cluster: Path, arguments: list[str], number: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "PATH": f"{cluster / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(number),  # the port follows from it
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "OMP_NUM_THREADS": "1",
    }
    script = ROOT / "training/accelerate/slurm.sh"
    with (cluster / "log").open("wb") as log:
        return subprocess.Popen(
            ["bash", str(script), *arguments], cwd=cluster, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def ended(cluster: Path, job: subprocess.Popen[bytes]) -> tuple[int, str]:
    """The job's exit code and log, once it has ended; one that does not is taken down with all that it started."""
    try:
        return job.wait(timeout=PATIENCE), (cluster / "log").read_text()
    except subprocess.TimeoutExpired:
        for process in (*psutil.Process(job.pid).children(recursive=True), job):
            process.kill()
        pytest.fail(f"the job has not ended\n{(cluster / 'log').read_text()}")


def test_a_run_that_nears_its_time_limit_saves_and_is_queued_again(cluster, made_photos):
    run = cluster / "run"
    number = 2 * os.getpid()
    job = submit(cluster, ["demo", *overrides(made_photos, run, **STEPS)], number)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not (metrics.is_file() and metrics.stat().st_size) and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    code, log = ended(cluster, job)
    assert code != 0
    assert list((run / "checkpoints").glob("step_*")), log
    assert re.search(r"exitcode\s*: 75", log), f"the launcher has not lived to see the run save\n{log}"
    assert (cluster / "requeued").read_text().strip() == str(number)


def test_a_run_that_fails_is_not_queued_again(cluster):
    job = submit(cluster, ["demo", "data.path=nowhere", "run.output=run"], 2 * os.getpid() + 1)
    code, log = ended(cluster, job)
    assert code != 0
    assert "nowhere" in log
    assert not (cluster / "requeued").exists()
