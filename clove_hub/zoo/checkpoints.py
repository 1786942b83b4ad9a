"""Reading weight files without ever running what is in them, and holding them to names and shapes.

A PyTorch checkpoint is a pickle, and a pickle is a program. Only two kinds of file are read here:
safetensors, and PyTorch files restricted to tensors and plain data (`weights_only=True`; `argparse.Namespace`
is let through, because released checkpoints keep their options in one, and it is a bag of values).
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WRAPPERS = ("model", "state_dict")
"""Under which of its keys a PyTorch checkpoint may keep the tensors of the network."""


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file by name, on the CPU, in the type they were stored in; and what else the file says.

    The kind of the file is seen from its first bytes, not from its name. Tensors of a PyTorch checkpoint are
    taken from `model` or `state_dict` if it has one of these, and otherwise from the top level. Large files
    are mapped into memory, so that an optimizer state stored along with the network costs nothing.

    Raises:
        ValueError: there is no such file, it is of another kind, it is damaged, it would have to run code to
            be read, or it does not hold named tensors. The message says what was found and the way out.
    """
    path = Path(path)
    kind = file_kind(path)
    if kind == "safetensors":
        return _read_safetensors(path)
    return _named_tensors(path, _read_pytorch(path, mapped=kind == "zip"))


def file_kind(path: Path) -> str:
    """`safetensors`, `zip` (PyTorch since 1.6) or `pickle` (before that), by the first bytes of the file."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a file with weights (.safetensors, .pth, .pt)")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; expected a file with weights") from error
    if head[8:9] == b"{":
        return "safetensors"
    if head[:4] == b"PK\x03\x04":
        return "zip"
    if head[:1] == b"\x80":
        return "pickle"
    raise ValueError(
        f"{path} is {_describe(head)}, not a file with weights: expected safetensors or a PyTorch "
        "checkpoint. Was the download complete, and was it the file itself that was downloaded?"
    )


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError naming the tensors of `what` that hold an infinity or a value that is no number."""
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ValueError(
            f"{what}: {counted('tensor', broken)} with values that are not finite; these weights come from a "
            "training that diverged or from a damaged file: take an earlier checkpoint"
        )


def require_names_and_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, Iterable[int]], what: str) -> None:
    """Raises ValueError unless `tensors` has exactly the names of `expected`, each with its shape."""
    problems = differences(tensors, expected)
    if problems:
        raise ValueError(f"{what}: {'; '.join(problems)}. Every tensor must have its place.")


def differences(tensors: Mapping[str, Tensor], expected: Mapping[str, Iterable[int]]) -> list[str]:
    """What keeps `tensors` from being `expected`, in words; empty if nothing does."""
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    misshaped = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name])}"
        for name, tensor in tensors.items()
        if name in expected and tuple(tensor.shape) != tuple(expected[name])
    ]
    kinds = (("missing", missing), ("unexpected", extra), ("mis-shaped", misshaped))
    return [counted(f"{kind} tensor", names) for kind, names in kinds if names]


def counted(noun: str, names: list[str], shown: int = 3) -> str:
    """`4 missing tensors (a, b, c and 1 more)`."""
    listed = ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} ({listed})"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is a damaged safetensors file ({error}); copy or download it again") from error


def _read_pytorch(path: Path, mapped: bool) -> Any:
    if mapped:
        _refuse_compressed(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        wanted = f"it asks for {named.group(1)}" if named else str(error).splitlines()[0]
        raise ValueError(
            f"{path} holds more than tensors and plain data ({wanted}), and reading that could run any code; "
            "it was not read. If you trust where it comes from, load it yourself and save its state dict as "
            "safetensors."
        ) from error
    except Exception as error:  # a broken pickle can fail in any way at all
        raise ValueError(
            f"{path} could not be read as a PyTorch checkpoint ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no details'}); copy or download it again"
        ) from error


def _refuse_compressed(path: Path) -> None:
    """torch.save stores its records as they are; compressed ones cannot be mapped, and may unfold to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = [i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is cut short or damaged ({error}); copy or download it again") from error
    if compressed:
        raise ValueError(
            f"{path} is a compressed zip archive ({compressed[0]}), not a PyTorch checkpoint: those are "
            "stored uncompressed. Unpack it and give the file that is inside."
        )


def _named_tensors(path: Path, data: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; expected a dict of named tensors")
    wrapper = next((key for key in WRAPPERS if isinstance(data.get(key), dict)), None)
    named = data[wrapper] if wrapper else data
    others = [str(name) for name, value in named.items() if not _is_named_tensor(name, value)]
    if others or not named:
        found = f"entries that are not tensors ({', '.join(others[:5])})" if others else "nothing"
        raise ValueError(
            f"{path} holds {found}{f' under {wrapper!r}' if wrapper else ''}; expected named tensors, at the "
            f"top level or under one of the keys {', '.join(map(repr, WRAPPERS))}"
        )
    rest = {str(key): value for key, value in data.items() if key != wrapper} if wrapper else {}
    return {name: tensor.detach() for name, tensor in named.items()}, rest


def _is_named_tensor(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided


def _describe(head: bytes) -> str:
    text = head.lstrip().lower()
    if not head:
        return "an empty file"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (`git lfs pull` fetches what it stands for)"
    if head[:2] == b"\x1f\x8b":
        return "a gzip archive"
    return f"a file that begins with {head[:8]!r}"
