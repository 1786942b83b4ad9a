"""Two bundles, a Hub on loopback and a process that publishes to it, for the tests of publishing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import TOKEN, LoopbackHub
from publish_worker import Worker
from synthetic import trained, write_checkpoint, write_run

from clove_hub.export import export_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("publish") / "run"
    write_run(run, "test_resnet", finished=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 10, "loss": 2.0}\n')
    longer = {name: tensor * 2 for name, tensor in trained("test_resnet").state_dict().items()}
    write_checkpoint(run / "checkpoints" / "step_00000020", longer, "test_resnet", 20, finished=True)
    return run


@pytest.fixture(scope="module")
def bundle(run: Path) -> Path:
    return export_run(run, run.parent / "bundle", checkpoint=10, license="mit")


@pytest.fixture(scope="module")
def newer(run: Path) -> Path:
    """Other weights of the same model."""
    return export_run(run, run.parent / "newer", checkpoint=20, license="mit")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LoopbackHub, Worker]]:
    home = tmp_path_factory.mktemp("home")
    with LoopbackHub() as hub, Worker(hub, home) as worker:
        yield hub, worker
    for file in home.rglob("*"):  # and what the client wrote on the disk
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file


@pytest.fixture
def hub(running: tuple[LoopbackHub, Worker]) -> LoopbackHub:
    """The Hub, empty."""
    hub = running[0]
    hub.repositories, hub.uploads, hub.renamed, hub.ignored, hub.before = {}, {}, {}, set(), None
    hub.private, hub.storage, hub.refusals = None, None, {}
    hub.forget()
    return hub


@pytest.fixture
def worker(running: tuple[LoopbackHub, Worker]) -> Worker:
    return running[1]
