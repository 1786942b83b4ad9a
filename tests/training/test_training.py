"""Training as a user meets it: commands, runs that are killed and go on, several processes, wrong input."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from patience import PATIENCE
from safetensors.torch import load_file
from training_runs import assert_same_run, last_checkpoint, launch, overrides, rows

from clove_hub.processes import STOPPED
from clove_hub.runs import read_state
from clove_hub.training.loop import divide_batch, divide_norms


def train_in_process(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    from clove_hub.cli import main

    sys.exit(main(["pretrain", "demo", *arguments]))


@pytest.fixture(scope="module")
def forkserver():
    """Processes that start at once, with everything imported: a run in each, to be killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clove_hub.training.loop"])
    return context


def start(context, arguments: list[str]):
    process = context.Process(target=train_in_process, args=(arguments,))
    process.start()
    return process


def finish(context, arguments: list[str]) -> int:
    process = start(context, arguments)
    process.join(PATIENCE)
    assert process.exitcode is not None
    return process.exitcode


def wait_for_step(run: Path, step: int, process) -> None:
    deadline = time.monotonic() + PATIENCE
    while process.is_alive() and time.monotonic() < deadline:
        if (run / "metrics.jsonl").is_file() and any(row["step"] >= step for row in rows(run)):
            return
        time.sleep(0.005)


# ---- runs that stop and go on ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_at_ten_random_steps_ends_bit_for_bit_like_one_left_alone(forkserver, made_photos, tmp_path):
    steps = 30
    assert finish(forkserver, overrides(made_photos, tmp_path / "whole", schedule__steps=steps)) == 0
    kills = sorted(random.Random(0).sample(range(1, steps), 10))
    for i, step in enumerate(kills):
        # The number of workers changes from one start to the next.
        process = start(
            forkserver, overrides(made_photos, tmp_path / "killed", schedule__steps=steps, data__workers=i % 3)
        )
        wait_for_step(tmp_path / "killed", step, process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert finish(forkserver, overrides(made_photos, tmp_path / "killed", schedule__steps=steps, data__workers=2)) == 0
    assert [row["step"] for row in rows(tmp_path / "killed")] == list(range(1, steps + 1))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_end_of_the_step_and_exits_with_its_code(forkserver, made_photos, tmp_path, number):
    arguments = overrides(made_photos, tmp_path / "run", schedule__steps=300, run__save_every=1000, data__workers=2)
    process = start(forkserver, arguments)
    wait_for_step(tmp_path / "run", 3, process)
    os.kill(process.pid, number)
    process.join(PATIENCE)
    assert process.exitcode == STOPPED
    saved = json.loads((last_checkpoint(tmp_path / "run") / "state.json").read_text())
    assert saved["step"] == rows(tmp_path / "run")[-1]["step"]
    assert not saved["finished"]


@pytest.mark.slow
def test_a_finished_run_started_again_does_nothing(forkserver, made_photos, tmp_path):
    arguments = overrides(made_photos, tmp_path / "run")
    assert finish(forkserver, arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert finish(forkserver, arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_finished_run_is_not_made_longer_in_silence(forkserver, made_photos, tmp_path, capsys):
    from clove_hub.cli import main

    arguments = overrides(made_photos, tmp_path / "run", schedule__steps=2, schedule__warmup_epochs=0)
    assert finish(forkserver, arguments) == 0
    assert main(["pretrain", "demo", *arguments, "schedule.steps=9"]) == 2
    assert "schedule.steps: 2 -> 9" in capsys.readouterr().err


def test_a_finished_run_whose_last_checkpoint_is_damaged_ends_once_more(made_photos, tmp_path, capsys):
    from clove_hub.cli import main

    arguments = overrides(
        made_photos, tmp_path / "run", schedule__steps=2, schedule__warmup_epochs=0, run__save_every=1
    )
    assert main(["pretrain", "demo", *arguments]) == 0
    newest = last_checkpoint(tmp_path / "run")
    (newest / "model.safetensors").write_bytes(b"half")
    capsys.readouterr()
    assert main(["pretrain", "demo", *arguments]) == 0
    assert capsys.readouterr().err.count("skipping the damaged checkpoint") == 1
    assert read_state(newest)["finished"]


@pytest.mark.slow
def test_the_newest_checkpoints_are_kept_and_a_damaged_one_falls_back(forkserver, made_photos, tmp_path):
    run = tmp_path / "run"
    assert finish(forkserver, overrides(made_photos, tmp_path / "whole", schedule__steps=8)) == 0
    assert [p.name for p in sorted((tmp_path / "whole" / "checkpoints").iterdir())] == [
        "step_00000006",
        "step_00000008",
    ]

    process = start(forkserver, overrides(made_photos, run, schedule__steps=8, run__keep=9))
    wait_for_step(run, 7, process)
    process.kill()
    process.join()
    newest = last_checkpoint(run)
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    result = launch("demo", *overrides(made_photos, run, schedule__steps=8, run__keep=9))
    assert result.returncode == 0
    assert re.search(rf"skipping the damaged checkpoint .*{newest.name}.*sha256", result.stderr)
    assert_same_run(tmp_path / "whole", run)


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("per_device", "shape"), [(2, "2 processes x 2 x 2"), (4, "2 processes x 4 x 1")])
def test_two_processes_train_what_one_trains(forkserver, made_photos, tmp_path, per_device, shape):
    """Batch norm's groups of four are a process's images, or span both."""
    slow = {"optimizer__learning_rate": 1}  # which does not make much of rounding
    assert finish(forkserver, overrides(made_photos, tmp_path / "one", batch__per_device=8, **slow)) == 0
    result = launch(
        "demo", *overrides(made_photos, tmp_path / "two", batch__per_device=per_device, **slow), processes=2
    )
    assert result.returncode == 0, result.stderr
    assert f"{shape}, batch norm over 4" in result.stderr
    assert [row["step"] for row in rows(tmp_path / "two")] == [1, 2, 3, 4]
    assert_alike(tmp_path / "one", tmp_path / "two")
    state = json.loads((last_checkpoint(tmp_path / "two") / "state.json").read_text())
    assert state["images_seen"] == 4 * 8


def assert_alike(one: Path, other: Path) -> None:
    """The losses of all steps and the running statistics, up to rounding."""
    for left, right in zip(rows(one), rows(other), strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-5)
    a, b = (load_file(last_checkpoint(run) / "model.safetensors") for run in (one, other))
    running = [name for name in a if "running" in name or "tracked" in name]
    assert running
    for name in running:
        assert (a[name].double() - b[name].double()).norm() <= 1e-3 * a[name].double().norm(), name


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(made_photos, tmp_path):
    run = tmp_path / "two"
    changes = {"batch__per_device": 2, "schedule__steps": 2000, "run__save_every": 5000}
    python = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*python, "-m", "clove_hub.training", "demo", *overrides(made_photos, run, **changes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as launcher:
        deadline = time.monotonic() + PATIENCE
        while not ((run / "metrics.jsonl").is_file() and rows(run)) and time.monotonic() < deadline:
            time.sleep(0.05)
        trainer = psutil.Process(launcher.pid).children()[-1]
        trainer.send_signal(signal.SIGTERM)
        _, said = launcher.communicate(timeout=PATIENCE)
    assert said.count("exitcode  : 75") == 2, said  # the launcher's own report of its two processes
    state = json.loads((last_checkpoint(run) / "state.json").read_text())
    assert 0 < state["step"] < 2000
    assert state["step"] == rows(run)[-1]["step"]


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_a_run_does_not_depend_on_accumulation(forkserver, made_photos, tmp_path):
    changes = {"batch__norm_group": 2, "schedule__steps": 2, "optimizer__learning_rate": 1}
    for per_device in (8, 2):
        run = tmp_path / str(per_device)
        assert finish(forkserver, overrides(made_photos, run, batch__per_device=per_device, **changes)) == 0
    assert_alike(tmp_path / "8", tmp_path / "2")
    assert rows(run)[0]["loss"] == pytest.approx(100, rel=0.05)


@pytest.mark.slow
def test_keeping_decoded_images_changes_nothing(forkserver, made_photos, tmp_path):
    for cache in ("false", "true"):
        changes = {"data__cache": cache, "data__workers": 2, "schedule__steps": 7}
        assert finish(forkserver, overrides(made_photos, tmp_path / cache, **changes)) == 0
    assert_same_run(tmp_path / "false", tmp_path / "true")


def test_metrics_hold_what_shows_a_collapse(forkserver, made_photos, tmp_path):
    assert finish(forkserver, overrides(made_photos, tmp_path / "run")) == 0
    row = rows(tmp_path / "run")[-1]
    assert 0.5 < row["embedding_spread"] <= 1
    assert -1 <= row["negative_cosine"] <= 1
    assert -1 <= row["positive_cosine"] <= 1
    assert row["gradient_norm"] > 0
    assert row["broken_images"] == 0


@pytest.mark.slow
def test_a_profile_names_the_parts_of_a_step(forkserver, made_photos, tmp_path):
    run = tmp_path / "run"
    changes = {"schedule__steps": 20, "schedule__warmup_epochs": 0, "run__profile": "true"}
    assert finish(forkserver, overrides(made_photos, run, **changes)) == 0
    summary = (run / "profile" / "summary.txt").read_text()
    for part in ("data", "views", "student", "teacher", "loss", "backward", "optimizer"):
        assert re.search(rf"^ +{part} ", summary, re.MULTILINE), part
    assert "traceEvents" in json.loads((run / "profile" / "trace.json").read_text())


def test_broken_images_are_replaced_counted_and_named(made_photos, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(made_photos, photos)
    (photos / "cut off.jpg").write_bytes((made_photos / "00.jpg").read_bytes()[:500])
    (photos / "no image.png").write_text("not an image at all")
    changes = {
        "batch__total": 13,
        "batch__per_device": 13,
        "batch__norm_group": 13,
        "schedule__warmup_epochs": 0,
    }  # 2 steps
    result = launch("demo", *overrides(photos, tmp_path / "run", **changes))
    assert result.returncode == 0, result.stderr
    for name in ("cut off.jpg", "no image.png"):
        assert re.search(rf"replaced the image .*{name}", result.stderr)
    assert rows(tmp_path / "run")[-1]["broken_images"] == 2


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(made_photos, tmp_path):
    run = tmp_path / "run"
    result = launch("demo", *overrides(made_photos, run, optimizer__learning_rate="1e30", optimizer__trust=1))
    assert result.returncode == 1
    assert "the optimizer has not stepped" in result.stderr
    assert "failed_" in result.stderr
    failed = next((run / "checkpoints").glob("failed_*"))
    weights = load_file(failed / "model.safetensors")
    assert all(
        torch.isfinite(w).all() for key, w in weights.items() if key.startswith("student") and "running" not in key
    )


# ---- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch__totl": 8}, "unknown key batch.totl (did you mean 'total'?)"),
        ({"metod__name": "clove"}, "unknown section 'metod' (did you mean 'method'?)"),
        ({"method__name": "clov"}, "did you mean 'clove'?"),
        ({"method__loss": "hinge"}, "choose one of ranking, per_pair, l2"),
        ({"batch__total": "many"}, "batch.total='many' is a str, expected int"),
        ({"batch__total": 9}, "batch.per_device=4 does not divide: choose batch.per_device=3"),
        ({"batch__total": 1, "schedule__warmup_epochs": 0}, "batch norm needs at least two: raise batch.total"),
        ({"batch__norm_group": 8}, "choose batch.per_device=8, or batch.norm_group=4 or 2, which"),
        ({"batch__norm_group": "null"}, "batch.norm_group=null: groups of 8 images cannot be formed"),
        ({"batch__norm_group": 1}, "batch.norm_group=1: must be at least 2"),
        ({"batch__total": 25, "batch__per_device": 25}, "has 24 images, fewer than one global batch"),
        ({"method__hard_negatives": 5}, "fewer than method.hard_negatives=5: raise method.global_size"),
        ({"method__global_views": 1, "method__local_views": 0}, "leaves no second view to compare with"),
        ({"backbone__model": "resnet51"}, "did you mean resnet"),
        ({"backbone__model": "resnet50.a1_in1k"}, "names pre-trained weights"),
        ({"backbone__model": "vit_tiny_patch16_224", "method__local_size": 50}, "choose 48 or 64"),
        ({"schedule__warmup_epochs": 9}, "is 27 steps, but the run has only 4"),
        ({"data__path": "/does/not/exist"}, "/does/not/exist"),
        ({"data__path": ""}, "data.path"),
        ({"data__draft": 32}, "data.draft=32"),
        ({"run__output": ""}, "run.output is not set"),
        ({"run__precision": "fp16"}, "choose bf16 or fp32"),
        ({"run__trackers": "[wandbb]"}, "run.trackers names 'wandbb'"),
        ({"run__keep": 0}, "run.keep=0: must be at least 1"),
    ],
)
def test_wrong_settings_are_named_before_the_first_step(made_photos, tmp_path, capsys, changes, message):
    from clove_hub.cli import main

    assert main(["pretrain", "demo", *overrides(made_photos, tmp_path / "run", **changes)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_unknown_recipe_names_the_nearest(capsys):
    from clove_hub.cli import main

    assert main(["pretrain", "clove_r50_in1k_20ep"]) == 2
    assert "did you mean 'clove_r50_in1k_200ep'?" in capsys.readouterr().err


@pytest.mark.slow
def test_going_on_with_other_settings_is_refused(forkserver, made_photos, tmp_path, capsys):
    from clove_hub.cli import main

    arguments = overrides(made_photos, tmp_path / "run", schedule__steps=40)
    process = start(forkserver, arguments)
    wait_for_step(tmp_path / "run", 3, process)
    process.kill()
    process.join()
    assert main(["pretrain", "demo", *arguments, "optimizer.learning_rate=9"]) == 2
    assert "optimizer.learning_rate: 40.0 -> 9.0" in capsys.readouterr().err
    other = tmp_path / "photos"
    other.mkdir()
    for photo in sorted(made_photos.iterdir())[:-1]:
        (other / photo.name).write_bytes(photo.read_bytes())
    assert main(["pretrain", "demo", *arguments, f"data.path={other}"]) == 2
    assert "the images: 24 in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("total", "per_device", "world", "expected"),
    [
        (2048, 256, 4, (256, 2)),
        (2048, 256, 8, (256, 1)),
        (2048, 256, 16, (128, 1)),
        (96, 40, 1, None),
        (10, 5, 4, None),
    ],
)
def test_the_global_batch_is_divided_or_refused(total, per_device, world, expected):
    if expected is None:
        with pytest.raises(ValueError, match="choose"):
            divide_batch(total, per_device, world)
    else:
        assert divide_batch(total, per_device, world) == expected


@pytest.mark.parametrize(
    ("group", "micro", "world", "choices"),
    [
        (1024, 256, 4, None),
        (1024, 256, 8, None),
        (128, 256, 1, None),
        (None, 2048, 1, None),
        (
            1024,
            256,
            1,
            "batch.per_device=2048 or 1024, or batch.norm_group=256 or 128 or 64 or 32 or 16 or 8 or 4 or 2, ",
        ),
        (96, 128, 4, "choose batch.norm_group=512 or 256 or 128 or 64 or 32 or 16 or 8 or 4, which"),
        (1024, 128, 12, "batch.norm_group=1536 or "),
        (4096, 1024, 2, "choose batch.norm_group=2048 or "),
    ],
)
def test_batch_norm_groups_are_formed_or_those_named_that_can_be(group, micro, world, choices):
    total = 2048 if world != 12 else 1536
    if choices is None:
        assert divide_norms(group, total, micro, world) == (group or total)
        return
    with pytest.raises(ValueError, match="cannot be formed") as refused:
        divide_norms(group, total, micro, world)
    assert choices in str(refused.value)
    for key, sizes in re.findall(r"batch\.(\w+)=([\d or]+)", str(refused.value).split("choose")[1]):
        for size in map(int, re.findall(r"\d+", sizes)):  # the way out works
            if key == "per_device":
                assert divide_norms(group, total, divide_batch(total, size, world)[0], world) == group
            else:
                assert divide_norms(size, total, micro, world) == size
