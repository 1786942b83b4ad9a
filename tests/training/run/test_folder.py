"""The owner of a run's folder: checkpoints by their health, rows, and what is said where a file cannot be written."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from patience import PATIENCE
from safetensors.torch import load_file
from torch import nn
from training_runs import launch, overrides

from benchmarks.faults import DAMAGE
from clove_hub.runs import checkpoint_folders, read_state
from clove_hub.training.run.checkpoints import save_tensors
from clove_hub.training.run.folder import RunFailed, RunFolder
from clove_hub.training.run.peers import Peers
from clove_hub.training.run.rescue import Undo

KEYS = ("step", "files")
SUPPORT = Path(__file__).parents[2] / "support"


def opened(run: Path, keep: int = 2) -> RunFolder:
    return RunFolder(run, Peers(1.0), keep, "run.output", KEYS)


def network(value: float = 0.0) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = nn.Linear(2000, 1)
    nn.init.constant_(module.weight, value)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(torch.ones(2000)).sum().backward()
    optimizer.step()
    return module, optimizer


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_of_the_same_step_is_written_again(tmp_path, kind):
    with opened(tmp_path) as folder:
        path = folder.save(1, *network(), {})
        DAMAGE[kind](path / "model.safetensors")
        folder.save(1, *network(), {})
        assert read_state(path, KEYS)["step"] == 1
    assert names(tmp_path) == ["step_00000001"]


def test_only_good_checkpoints_count_and_strays_are_none(tmp_path):
    with opened(tmp_path, keep=1) as folder:
        for step in (1, 2):
            folder.save(step, *network(), {})
            assert names(tmp_path) == [f"step_0000000{step}"]
        folder.keep = 2
        DAMAGE["a bit flipped"](folder.save(3, *network(), {}) / "model.safetensors")
        (tmp_path / "checkpoints" / "step_best").mkdir()
        (tmp_path / "checkpoints" / "step_00000099").write_text("a file")
        folder.save(4, *network(), {})
        folder.keep = 1
        DAMAGE["cut off"](tmp_path / "checkpoints" / "step_00000004" / "state.json")
        # Whatever is damaged, one that is good stays.
        folder._prune()
        assert read_state(tmp_path / "checkpoints" / "step_00000002", KEYS)
    with opened(tmp_path) as folder:
        assert folder.found[1]["step"] == 2


def test_weights_that_are_not_finite_never_become_a_regular_checkpoint(tmp_path):
    with opened(tmp_path) as folder:
        folder.save(1, *network(), {})
        with pytest.raises(FloatingPointError, match=r"1 tensors hold .*weight.*failed_00000002"):
            folder.save(2, *network(float("nan")), {})
    assert names(tmp_path) == ["failed_00000002", "step_00000001"]


def test_a_checkpoint_with_such_weights_from_an_earlier_version_is_passed_over(tmp_path, monkeypatch, caplog):
    from clove_hub.training.run import checkpoints

    with opened(tmp_path) as folder:
        folder.save(1, *network(), {})
        monkeypatch.setattr(checkpoints, "not_finite", lambda tensors: [])
        folder.save(2, *network(float("inf")), {})
    with opened(tmp_path) as folder:
        assert folder.found[1]["step"] == 1
    assert "weight holds non-finite values" in caplog.text


def test_what_was_half_written_goes_and_an_unused_folder_too(tmp_path):
    with opened(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a").exists()
    partial = tmp_path / "run" / "checkpoints" / ".step_00000007.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    with opened(tmp_path / "run"):
        assert not partial.exists()


def test_a_folder_that_is_moved_is_followed_and_one_that_is_deleted_ends_the_run(tmp_path, caplog):
    run, moved = tmp_path / "run", tmp_path / "moved"
    undo = Undo([])

    def trained(folder: RunFolder, away: Callable[[], object]) -> None:
        with folder, folder.rescuing(undo, lambda: folder.write(2, *network(), {})):
            folder.append("metrics.jsonl", {"step": 1})
            away()
            folder.append("metrics.jsonl", {"step": 2})

    with pytest.raises(RunFailed, match=f"was moved to {moved}.*run.output={moved}"):
        trained(opened(run), lambda: run.rename(moved))
    assert [path.name for path in checkpoint_folders(moved)] == ["step_00000002"]
    assert not (moved / "lock.json").exists()
    assert "saved after step 2" in caplog.text
    assert "the same command" not in caplog.text  # it would begin anew
    assert not run.exists()
    with pytest.raises(RunFailed, match="was deleted while the run was writing"):
        trained(opened(run), lambda: shutil.rmtree(run))
    assert not run.exists()


def test_too_little_room_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with opened(tmp_path) as folder:
        folder.save(1, *network(), {})
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5000))
        with pytest.raises(RunFailed, match=r"needs 1\.6e-05 GB, but 5e-06 GB are free.*step 1 is kept"):
            folder.save(2, *network(), {})
    assert names(tmp_path) == ["step_00000001"]


# ---- a system that fails ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failing_disk(tmp_path_factory) -> Path:
    """A library that fails the nth file operation of a process."""
    library = tmp_path_factory.mktemp("disk") / "failing_disk.so"
    command = ["cc", "-shared", "-fPIC", "-o", str(library), str(SUPPORT / "failing_disk.c"), "-ldl"]
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("needs Linux and a C compiler")
    subprocess.run(command, check=True, capture_output=True)
    return library


@pytest.mark.slow
def test_every_file_operation_of_a_save_may_fail(failing_disk, tmp_path):
    environment = os.environ | {"LD_PRELOAD": str(failing_disk), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SUPPORT / "disk_faults.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout)
    assert len(cases) >= 100
    assert {case["operation"] for case in cases} >= {"open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir"}
    for case in cases:
        assert case["good"], case  # old or new state, whole
        assert case["next"] == case["good"][0], case
        assert "damaged" not in case, case  # an old one that is half removed neither
        assert case["left"] == [], case
        if case["error"]:
            assert case["error"].startswith("RunFailed: " + str(tmp_path)), case
            assert "step 1 is kept: fix this" in case["error"], case
            assert "\n" not in case["error"], case
        elif case["operation"] in ("unlink", "rmdir"):
            assert case["good"][0] == 2, case
            assert "cannot be removed" in "".join(case["said"]), case


@pytest.mark.parametrize(("size", "steps"), [("64k", 0), ("4300k", 0), ("9m", 2), ("15m", 2)])
def test_a_full_disk_ends_a_run_with_one_sentence(made_photos, tmp_path, size, steps):
    """A file system that really is full, after more and more of the run."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    isolated = ["unshare", "-Urm", "sh", "-c"]
    mount = f'mount -t tmpfs -o size={size} tmpfs "{mounted}"'
    try:
        subprocess.run([*isolated, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system does not let a test mount a file system of its own")
    words = overrides(made_photos, mounted / "run", schedule__steps=50, run__save_every=2, run__keep=50)
    command = [*isolated, f'{mount} && "$@"; code=$?; ls "{mounted}/run/checkpoints"; exit $code', "sh"]
    command += [sys.executable, "-m", "clove_hub.training", "demo", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert str(mounted) in error
    assert ("step" in error and "is kept: fix this" in error) if steps else "No checkpoint was written yet" in error
    assert done.stdout.split() == [f"step_{step:08d}" for step in range(2, 2 * len(done.stdout.split()) + 1, 2)]


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_one_sentence(made_photos, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / ("long" * 100), tmp_path / "file" / "run", Path("/proc/run")):
        done = launch("demo", *overrides(made_photos, output))
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert "No checkpoint was written yet: fix this and start again" in done.stderr


def test_what_was_saved_is_what_is_there(tmp_path):
    module, optimizer = network()
    with opened(tmp_path) as folder:
        path = folder.save(1, module, optimizer, {})
    saved = load_file(path / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())
    with opened(tmp_path) as folder:
        other, moments = network(3.0)
        assert folder.restore(other, moments) == 1
    assert torch.equal(other.weight, module.weight)
    assert torch.equal(
        moments.state[other.weight]["momentum_buffer"], optimizer.state[module.weight]["momentum_buffer"]
    )


def test_whoever_reads_the_folder_reads_the_tensors(tmp_path):
    """safetensors 0.8 alone would write them for their owner only."""
    before = os.umask(0o027)
    try:
        save_tensors(tmp_path / "model.safetensors", {"weight": torch.zeros(2)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o640
