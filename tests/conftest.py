"""What every test may use: the golden numbers and, where they are at hand, real photos."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped without one; those that talk to a server on loopback are `network`."""
    import torch

    for item in items:
        if "hub" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.network)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def untouched_logging() -> None:
    """A command that an earlier test ran has set up logging; this one begins with what Python begins with."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)


@pytest.fixture(autouse=True)
def untouched_signals() -> Iterator[None]:
    """A run that a signal has stopped goes on ignoring it, and so would all that later tests start."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def golden() -> Mapping[str, Mapping[str, np.ndarray]]:
    """Numbers recorded from the released code, by the name of the file."""
    return {path.stem: dict(np.load(path)) for path in (Path(__file__).parent / "golden").glob("*.npz")}


@pytest.fixture(scope="session")
def photos() -> Path:
    """A folder of real photos; tests that need it skip where it is absent."""
    folder = SHARED / "data" / "pretrain"
    if not folder.is_dir():
        pytest.skip(f"the photos are not at hand ({folder})")
    return folder


@pytest.fixture(scope="session")
def made_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 small made pictures, for tests that need images but not real ones."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("made_photos")
    rng = np.random.default_rng(0)
    for i in range(24):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((120 + i, 90), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.jpg")
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what it is made of."""
    source = tmp_path_factory.mktemp("source")
    for name in ("clove_hub", "training", "export", "model_cards"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(source / "dist"),
        str(source),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return next((source / "dist").glob("*.whl"))
