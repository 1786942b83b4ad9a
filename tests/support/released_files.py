"""Files that released code wrote, without their values: their pickles, byte for byte, and a program that writes them again.

They lie packed beside the tests; what each folder holds says the README in it.
"""

from __future__ import annotations

import importlib.util
import json
import tarfile
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKED = Path(__file__).parents[1] / "released.tar.xz"


@cache
def unpacked() -> tempfile.TemporaryDirectory[str]:
    """Of this process; it goes with it."""
    folder = tempfile.TemporaryDirectory(prefix="released")
    with tarfile.open(PACKED) as packed:
        packed.extractall(folder.name, filter="data")
    return folder


def names() -> list[str]:
    with tarfile.open(PACKED) as packed:
        return sorted(Path(name).parent.name for name in packed.getnames() if name.endswith("/expect.json"))


def expected(name: str) -> dict[str, Any]:
    """What a right reader says of the file."""
    told: dict[str, Any] = json.loads((Path(unpacked().name) / name / "expect.json").read_text())
    return told


@cache
def _program() -> Any:
    found = importlib.util.spec_from_file_location("rebuild", Path(unpacked().name) / "rebuild.py")
    assert found is not None
    assert found.loader is not None
    program = importlib.util.module_from_spec(found)
    found.loader.exec_module(program)
    return program


def rebuild(name: str, folder: Path, seed: int) -> Path:
    """The file, as large as it was, with random weights."""
    path: Path = _program().rebuild(Path(unpacked().name) / name, folder / expected(name)["file"], seed=seed)
    return path


def stored(name: str, seed: int, probe: Mapping[str, Any]) -> Tensor:
    """The numbers of one tensor in that file, in a row."""
    dtype, content = _program().values(
        Path(unpacked().name) / name, seed, probe["storage"], probe["offset"], probe["count"]
    )
    return torch.frombuffer(bytearray(content), dtype=getattr(torch, dtype))
