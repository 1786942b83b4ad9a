"""What ends a run in the middle costs no step, and there is a way on from everything that is said."""

import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from patience import PATIENCE
from training_runs import TINY, assert_same_run, last_checkpoint, launch, overrides, rows

from benchmarks.faults import launched, signaled, wait_until
from clove_hub.runs import read_rows
from clove_hub.training import loop
from clove_hub.training.recipe import load
from clove_hub.training.run.lock import Lock
from clove_hub.training.run.rescue import uninterrupted
from clove_hub.training.run.sampler import data_position

LONG = {"schedule__steps": 3000, "run__save_every": 3000}


def saved_step(run: Path) -> int:
    return json.loads((last_checkpoint(run) / "state.json").read_text())["step"]


class Killed(BaseException):
    """Whatever may end a run, in the middle of a step."""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["begin_step", "forward", "optimizer"])
def test_an_exception_within_a_step_saves_the_state_before_it(made_photos, tmp_path, monkeypatch, where):
    """And the run then ends as if nothing had been: what the step had changed until then was put back."""
    from clove_hub.methods.clove import Clove
    from clove_hub.training.optimizer import LARS

    words = overrides(made_photos, tmp_path / "whole", schedule__steps=6, run__save_every=100)
    assert loop.train(load("demo", words)) == 0
    words = overrides(made_photos, tmp_path / "broken", schedule__steps=6, run__save_every=100)
    owner, name = {"begin_step": (Clove, "begin_step"), "forward": (Clove, "loss"), "optimizer": (LARS, "step")}[where]
    calls, original = [], getattr(owner, name)

    def fail_at_the_fourth(self, *args, **kwargs):
        calls.append(1)
        result = original(self, *args, **kwargs)
        if len(calls) == (7 if where == "forward" else 4):  # there are two micro-batches in a step
            raise Killed
        return result

    monkeypatch.setattr(owner, name, fail_at_the_fourth)
    with pytest.raises(Killed):
        loop.train(load("demo", words))
    monkeypatch.undo()
    saved = sorted(path.name for path in (tmp_path / "broken" / "checkpoints").glob("step_*"))
    # Nothing can be put back once weights have moved; then the checkpoint before stays, of which there was none here.
    assert saved == ([] if where == "optimizer" else ["step_00000003"])
    assert loop.train(load("demo", words)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.fixture
def running(made_photos, tmp_path):
    """A run in a process of its own, after a few steps, on photos of its own."""
    photos = tmp_path / "photos"
    shutil.copytree(made_photos, photos)
    run = tmp_path / "run"
    words = overrides(photos, run, data__workers=2, **LONG)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "clove_hub.training", "demo", *words]
    heard = functools.partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # where tests run in the background, it is not
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heard) as process:
        deadline = time.monotonic() + PATIENCE
        while not ((run / "metrics.jsonl").is_file() and len(rows(run)) > 2) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield process, photos, run
        process.kill()


@pytest.mark.slow
def test_ctrl_c_saves_after_the_step(running):
    process, _, run = running
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "asked to stop: saved after step" in said
    assert "Traceback" not in said
    assert saved_step(run) == rows(run)[-1]["step"]
    assert not (run / "lock.json").exists()


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_no_step(running):
    process, _, run = running
    psutil.Process(process.pid).children()[0].kill()
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert re.search(
        r"^error: a data-loading worker \(process \d+\) (was killed \(Killed\)|has ended)", said, re.MULTILINE
    ), (
        said  # torch sees the signal, or only that nobody is at the other end of the pipe
    )
    # Where it dies while a batch is fetched out of its memory, Python's own thread that hands it over complains, too.
    assert "Traceback" not in said or "resource_sharer" in said
    assert "could not be saved" not in said
    assert saved_step(run) == rows(run)[-1]["step"]


@pytest.mark.slow
def test_images_that_vanish_cost_no_step(running):
    process, photos, run = running
    shutil.rmtree(photos)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "images of 'photos' in a row cannot be used" in said
    assert "Traceback" not in said
    assert saved_step(run) == rows(run)[-1]["step"]


@pytest.mark.slow
def test_a_rank_that_is_frozen_ends_the_others_after_a_while(made_photos, tmp_path):
    run = tmp_path / "run"
    words = overrides(made_photos, run, batch__per_device=2, run__timeout=0.3, **LONG)
    with launched(["demo", *words], tmp_path / "log") as launcher:
        wait_until(lambda: len(read_rows(run / "metrics.jsonl")) > 2, launcher)
        main_rank, other = sorted(launcher.children(), key=lambda one: int(one.environ()["RANK"]))
        other.suspend()
        main_rank.wait(PATIENCE)
        other.kill()  # what the launcher does half a minute later
    said = (tmp_path / "log").read_text()
    assert "another process of this run has ended or does not respond" in said
    assert "raise run.timeout" in said
    assert saved_step(run) == rows(run)[-1]["step"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("batch.totl=8", "unknown key batch.totl"),
        ("batch.total=16", "batch.total is 16 for process 1 on {host}, and 8 for"),
    ],
)
def test_a_rank_that_is_started_otherwise_is_named_by_all(made_photos, tmp_path, word, said):
    words = ["demo", *overrides(made_photos, tmp_path / "run", batch__per_device=2)]
    with launched(words, tmp_path / "log", [*words, word]) as launcher:
        assert launcher.wait(PATIENCE) == 1
    host, log = socket.gethostname(), (tmp_path / "log").read_text()
    errors = [line for line in re.findall(r"^.*error.*$", log, re.MULTILINE) if said.format(host=host) in line]
    assert len([line for line in errors if f"error (process 1 on {host})" in line]) == 1, log
    assert len([line for line in errors if line.startswith("error: ")]) == 1, log
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_second_start_is_refused_and_the_first_goes_on(running):
    process, photos, run = running
    second = launch("demo", *overrides(photos, run, **LONG))
    assert second.returncode == 1
    assert f"error: {run} is being written by process {process.pid} on" in second.stderr
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 75
    assert [row["step"] for row in rows(run)] == list(range(1, saved_step(run) + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "target", "lost"), [("SIGKILL", "launcher", 0), ("SIGKILL", "rank 1", 0), ("SIGHUP", "group", 0)]
)
def test_two_ranks_are_saved_and_end(made_photos, tmp_path, number, target, lost):
    case = signaled(str(made_photos), tmp_path / "run", signal.Signals[number], target)
    assert (case["lost"], case["left"]) == (lost, 0), case


# ---- ways on ---------------------------------------------------------------------------------------------------------


def advice(text: str) -> str:
    return " ".join(text.split())


def test_a_run_that_diverged_goes_on_as_its_message_says(made_photos, tmp_path, capsys):
    from clove_hub.cli import main

    words = overrides(made_photos, tmp_path / "run", schedule__steps=12, run__save_every=2, optimizer__trust=1)
    changed = ["optimizer.learning_rate=1e25"]
    assert main(["pretrain", "demo", *words, "schedule.steps=2", "schedule.warmup_epochs=0"]) == 0
    diverging = [*words, "schedule.warmup_epochs=0", *changed]
    assert main(["pretrain", "demo", *diverging, "run.amend=true"]) == 1
    said = advice(capsys.readouterr().err)
    assert "resumes from step" in said
    assert "add run.amend=true with a lower optimizer.learning_rate (now 1e+25)" in said
    # The batches to leave out can be typed as they are printed; a wrong word would be 2.
    skip = re.search(r"'(data\.skip=\[\S+\]\])'", said)
    assert skip
    assert main(["pretrain", "demo", *diverging, skip[1], "run.amend=true"]) == 1
    # The same command comes to the same place ...
    assert main(["pretrain", "demo", *diverging, "run.amend=true"]) == 1
    # ... and the advice leads past it.
    assert main(["pretrain", "demo", *diverging, "optimizer.learning_rate=0.1"]) == 2
    assert "add run.amend=true" in advice(capsys.readouterr().err)
    assert main(["pretrain", "demo", *diverging, "optimizer.learning_rate=0.1", "run.amend=true"]) == 0
    changes = json.loads((last_checkpoint(tmp_path / "run") / "state.json").read_text())["changes"]
    assert [change["step"] for change in changes] == [2]
    assert {"schedule.steps: 2 -> 12", "optimizer.learning_rate: 40.0 -> 0.1"} <= set(changes[0]["changed"])
    # Started once more without the permission it is the same run.
    assert main(["pretrain", "demo", *diverging, "optimizer.learning_rate=0.1"]) == 0
    assert "is finished" in capsys.readouterr().err


def test_batches_can_be_left_out(made_photos, tmp_path):
    assert [data_position(step, [(5, 6), (2, 3)]) for step in range(5)] == [0, 3, 6, 7, 8]
    assert [data_position(step, None) for step in range(3)] == [0, 1, 2]


def test_a_finished_run_can_be_made_longer_or_begun_from(made_photos, tmp_path, capsys):
    from clove_hub.cli import main

    run, changes = tmp_path / "run", {"schedule__steps": 2, "schedule__warmup_epochs": 0}
    words = overrides(made_photos, run, **changes)
    assert main(["pretrain", "demo", *words]) == 0
    assert main(["pretrain", "demo", *words, "schedule.steps=4"]) == 2
    said = advice(capsys.readouterr().err)
    assert "add run.amend=true" in said
    assert f"run.init_from={run}" in said
    assert main(["pretrain", "demo", *words, "schedule.steps=4", "run.amend=true"]) == 0
    assert saved_step(run) == 4
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    new = ["schedule.steps=4", f"run.init_from={run}", f"run.output={tmp_path / 'new'}"]
    assert main(["pretrain", "demo", *words, *new]) == 0
    assert main(["pretrain", "demo", *words, "schedule.steps=3", "run.amend=true"]) == 2
    assert (
        "is at step 4, but would end at step 3 with the changed settings: set schedule.steps to 4 or more"
        in capsys.readouterr().err
    )
    assert main(["pretrain", "demo", *words, "schedule.steps=4", "method.feature_dim=8", "run.amend=true"]) == 2
    assert "choose another run.output" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["inf", "nan", "-0.1", "-inf"])
def test_a_learning_rate_that_is_none_is_refused(made_photos, tmp_path, capsys, value):
    from clove_hub.cli import main

    assert main(["pretrain", "demo", *overrides(made_photos, tmp_path / "run", optimizer__learning_rate=value)]) == 2
    assert "optimizer.learning_rate=" in capsys.readouterr().err


def test_python_is_told_as_well_and_no_signal_handler_is_left(made_photos, tmp_path):
    import clove_hub

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)]
    folder = tmp_path / "run"
    folder.mkdir()
    lock = Lock(folder)
    with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on"):
        clove_hub.pretrain("demo", **TINY | {"data.path": made_photos, "run.output": folder})
    lock.release()
    assert before == [
        signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    ]


def test_the_card_says_what_was_changed_on_the_way(made_photos, tmp_path):
    from clove_hub.cli import main

    run, bundle = tmp_path / "run", tmp_path / "bundle"
    words = overrides(made_photos, run, schedule__steps=2, schedule__warmup_epochs=0)
    assert main(["pretrain", "demo", *words]) == 0
    changed = ["schedule.steps=3", "data.skip=[[3, 3]]"]
    assert main(["pretrain", "demo", *words, *changed, "run.amend=true"]) == 0
    assert main(["pretrain", "demo", *words, *changed]) == 0  # which is the run now
    assert main(["export", str(run), "--out", str(bundle)]) == 0
    said = (bundle / "README.md").read_text()
    assert "| changed after step 2 | `data.skip: null -> [[3, 3]]; schedule.steps: 2 -> 3` |" in said
    assert "| `backbone.pretrained` | `null` |" in said


def test_the_signal_of_a_dead_worker_does_not_interrupt_what_is_saved():
    def tell(number, frame):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    def save():
        with uninterrupted(signal.SIGCHLD):
            signal.raise_signal(signal.SIGCHLD)
            done.append("saved")

    before, done = signal.signal(signal.SIGCHLD, tell), []
    try:
        with pytest.raises(RuntimeError, match="pid 7"):
            save()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert done == ["saved"]
