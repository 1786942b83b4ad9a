"""A training in Detectron2 that goes on sees what it would have seen, and signals end it with a checkpoint."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import detectron2.utils.comm as comm
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from patience import PATIENCE, until
from small_detectron2 import SMALL, command, photos_of_coco
from synthetic import write_run

from clove_hub.export.detectron2.config import empty_config
from clove_hub.export.detectron2.order import in_order

IMAGES = 37
RECORDS = [
    {
        "image_id": number,
        "file_name": f"{number}.jpg",
        "width": 640 if number % 3 else 427,
        "height": 480,
        "annotations": [{"category_id": 1, "iscrowd": 0}],
    }
    for number in range(IMAGES)
]
SAMPLERS: dict[str, Callable[[], Any]] = {
    "TrainingSampler": lambda: TrainingSampler(IMAGES, seed=5),
    "RepeatFactorTrainingSampler": lambda: RepeatFactorTrainingSampler(1 + torch.arange(IMAGES) / IMAGES, seed=5),
}


def augmented(record: dict[str, Any]) -> dict[str, Any]:
    """Stands for Detectron2's mapper, which draws from the same generator."""
    return record | {"drawn": np.random.rand()}  # noqa: NPY002


def seen(loader: Any, count: int, field: str = "image_id") -> list[list[Any]]:
    return [[record[field] for record in batch] for batch in islice(loader, count)]


# ---- the order -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[(0, 1), (0, 2), (1, 2)], ids=lambda process: "process {} of {}".format(*process))
def process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    rank, world = request.param
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: world)
    monkeypatch.setattr("detectron2.data.build.get_world_size", lambda: world)


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "ungrouped"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_from_any_iteration_on_the_images_are_those_of_detectron2s_own_loader(sampler: str, grouped: bool) -> None:
    def loader(workers: int = 0) -> Any:
        return build_detection_train_loader(
            RECORDS,
            mapper=augmented,
            sampler=SAMPLERS[sampler](),
            total_batch_size=4,
            aspect_ratio_grouping=grouped,
            num_workers=workers,
        )

    expected = seen(loader(), 60)
    if grouped:
        assert all(len({number % 3 > 0 for number in batch}) == 1 for batch in expected)
    for start in (0, 1, 41):  # the last is beyond an epoch, whatever the number of processes
        assert seen(in_order(loader(), 7, start), 60 - start) == expected[start:]
    assert seen(in_order(loader(workers=2), 7, 41), 10) == expected[41:51]


def test_augmentations_go_on_too_and_differ_between_images_iterations_processes_and_seeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def drawn(start: int, seed: int = 7, workers: int = 0) -> list[list[float]]:
        loader = build_detection_train_loader(
            RECORDS,
            mapper=augmented,
            sampler=TrainingSampler(IMAGES, seed=5),
            total_batch_size=2 * comm.get_world_size(),
            num_workers=workers,
        )
        return seen(in_order(loader, seed, start), 12, "drawn")

    without_a_stop = drawn(0)
    assert drawn(4)[:8] == without_a_stop[4:]
    assert drawn(0, workers=2) == without_a_stop
    others = drawn(0, seed=8)
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    numbers = [number for batch in (*without_a_stop, *others, *drawn(0)) for number in batch]
    assert len(set(numbers)) == 3 * 12 * 2


def test_what_is_passed_over_is_not_read() -> None:
    read = []
    loader = build_detection_train_loader(
        RECORDS, mapper=lambda record: read.append(record) or record, total_batch_size=2, num_workers=0
    )
    seen(in_order(loader, 7, 2000), 1)
    assert len(read) == 2


def test_images_of_densepose_go_on_too() -> None:
    pytest.importorskip("densepose", reason="Detectron2's DensePose project is not installed")
    from densepose.data import build_detection_train_loader as build_densepose_loader

    def records() -> list[dict[str, Any]]:
        return [record | {"annotations": [{"category_id": 1, "segmentation": []}]} for record in RECORDS]

    DatasetCatalog.register("some_people", records)
    MetadataCatalog.get("some_people").categories = {1: "person"}
    cfg = empty_config(densepose=True)
    cfg.DATASETS.TRAIN, cfg.SEED, cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = ("some_people",), 3, 2, 0
    cfg.MODEL.MASK_ON = True
    try:
        expected = seen(build_densepose_loader(cfg, mapper=augmented), 40)
        assert seen(in_order(build_densepose_loader(cfg, mapper=augmented), cfg.SEED, 25), 15) == expected[25:]
    finally:
        DatasetCatalog.remove("some_people")
        MetadataCatalog.remove("some_people")


# ---- stopping --------------------------------------------------------------------------------------------------------

TINY = """
import json, multiprocessing, os, signal, sys, time
from types import SimpleNamespace
import torch
import detectron2.utils.comm as comm
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import SimpleTrainer, launch
from detectron2.engine.hooks import CallbackHook
from torch.multiprocessing.spawn import ProcessExitedException
from clove_hub.export.detectron2.stopping import StopRequests, pass_on_signals

class Model(torch.nn.Linear):
    def forward(self, batch):
        return {"loss": super().forward(batch).mean()}

def signaled(trainer):
    if trainer.iter == 3:
        name, number = sys.argv[2].split()
        pid = {"first": os.getpid(), "second": os.getpid(), "launcher": os.getppid()}[name]
        if comm.get_rank() == (name == "second"):
            os.kill(pid, getattr(signal, number))
            if name == "launcher":
                time.sleep(1)  # until it has been passed on

def main(folder):
    stop = StopRequests()
    model = Model(2, 1)
    trainer = SimpleTrainer(model, [torch.ones(1, 2)] * 1000, torch.optim.SGD(model.parameters(), 0.01))
    trainer.cfg = SimpleNamespace(TEST=SimpleNamespace(EVAL_PERIOD=0))
    trainer.checkpointer = DetectionCheckpointer(model, folder, trainer=trainer)
    def told(trainer):  # in one piece, as the processes share the pipe
        os.write(1, f"AFTER {comm.get_rank()} {trainer.iter}\\n".encode())

    trainer.register_hooks([CallbackHook(before_step=signaled), stop, CallbackHook(after_train=told)])
    trainer.train(0, 1000)

if __name__ == "__main__":
    pass_on_signals()
    try:
        launch(main, 2, dist_url="auto", args=(sys.argv[1],))
    except ProcessExitedException as error:
        sys.exit(error.exit_code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "code"),
    [("second SIGUSR1", 75), ("first SIGHUP", 75), ("launcher SIGTERM", 75), ("launcher SIGINT", 130)],
)
def test_two_processes_end_at_the_same_iteration_with_a_checkpoint(tmp_path: Path, asked: str, code: int) -> None:
    (tmp_path / "tiny.py").write_text(TINY)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "tiny.py"), str(tmp_path), asked],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == code, done.stderr[-3000:]
    ends = sorted(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("AFTER"))
    (first, iteration), (second, same) = ends
    assert (first, second) == ("0", "1")
    assert iteration == same
    assert 3 <= int(iteration) < 999
    assert (tmp_path / "last_checkpoint").read_text() == f"model_{int(iteration):07d}.pth"
    saved = torch.load(tmp_path / f"model_{int(iteration):07d}.pth", weights_only=True)
    assert saved["iteration"] == int(iteration)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone and a few photos."""
    root = tmp_path_factory.mktemp("place")
    photos_of_coco(root / "datasets")
    write_run(root / "run", "resnet50")
    return root


def checkpoint(out: Path) -> Path | None:
    marked = out / "seed_0" / "last_checkpoint"
    return marked.parent / marked.read_text() if marked.is_file() else None


@pytest.mark.slow
def test_a_signal_ends_the_training_with_a_checkpoint_and_so_does_the_death_of_the_command(
    place: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    small = [*SMALL, "SOLVER.MAX_ITER", "500", "SOLVER.CHECKPOINT_PERIOD", "1000", "DATALOADER.NUM_WORKERS", "1"]
    begun = "Starting training from iteration {}"

    def started(iteration: int) -> subprocess.Popen[str]:
        with log.open("w") as file:
            process: subprocess.Popen[str] = subprocess.Popen(
                **command("coco_fpn", place / "run", place / "datasets", out, *small),
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        until(lambda: begun.format(iteration) in log.read_text() or process.poll() is not None)
        until(lambda: len(members(process.pid)) > 2 or process.poll() is not None)  # a worker reads images
        return process

    first = started(0)
    first.kill()
    first.wait()
    until(lambda: not members(first.pid))
    saved = checkpoint(out)
    assert saved is not None
    reached = int(saved.stem.rpartition("_")[2]) + 1

    second = started(reached)
    os.killpg(second.pid, signal.SIGTERM)
    assert second.wait() == 75, log.read_text()[-3000:]
    until(lambda: not members(second.pid))
    later = checkpoint(out)
    assert later is not None
    assert int(later.stem.rpartition("_")[2]) >= reached
    assert "Traceback" not in log.read_text()
    assert (
        log.read_text().splitlines()[-1]
        == f"WARNING: {out / 'seed_0'} is stopped: run the same command again to resume"
    )


def members(group: int) -> list[str]:
    """Processes of a group that have not ended."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [row[2] for row in rows if row[0] == str(group) and not row[1].startswith("Z")]


@pytest.mark.slow
def test_a_training_that_diverges_fails_in_a_sentence_and_what_was_saved_last_is_finite(
    place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    small = [*SMALL, "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.BASE_LR", "1000.0", "SOLVER.WARMUP_ITERS", "0"]
    done = subprocess.run(
        **command("coco_fpn", place / "run", place / "datasets", out, *small), capture_output=True, check=False
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: seed 0 diverged and is left out: {out / 'seed_0'}: ")
    assert "became infinite or NaN at iteration=" in last
    assert last.endswith("Choose a SOLVER.BASE_LR below 1000 and another --out")
    saved = checkpoint(out)
    assert saved is not None
    # Detectron2 wrote it just now, with NumPy scalars of its scheduler in it.
    assert all(tensor.isfinite().all() for tensor in torch.load(saved, weights_only=False)["model"].values())
