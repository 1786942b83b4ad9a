"""Reading weight files without ever running what is in them, and holding them to names and shapes.

A PyTorch checkpoint is a pickle, and a pickle is a program. Only two kinds of file are read here:
safetensors, and PyTorch files restricted to tensors and plain data (`weights_only=True`; `argparse.Namespace`
is let through, because released checkpoints keep their options in one, and it is a bag of values).
"""

from __future__ import annotations

import argparse
import json
import stat
import struct
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .pickles import LARGEST, Refused, check_pickle

WRAPPERS = ("model", "state_dict")
"""Under which of its keys a PyTorch checkpoint may keep the tensors of the network."""
NUMBERS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
"""Types that weights and their counters are stored in."""
LARGEST_HEADER = 16 << 20
"""Bytes of a safetensors header; a ResNet-50's has some forty thousand."""
LARGEST_FLOAT = torch.finfo(torch.float32).max
COMPUTED = ("weight", "bias", "running_mean", "running_var")
"""How the names of tensors end that a network computes with; the others may be counters and tables."""
LONGEST_NAME = 120
"""Characters of a name that is shown."""


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file by name, on the CPU, in the type they were stored in; and what else the file says.

    The kind of the file is seen from its first bytes, not from its name. Tensors of a PyTorch checkpoint are
    taken from `model` or `state_dict` if it has one of these, and otherwise from the top level. Large files
    are mapped into memory, so that an optimizer state stored along with the network takes up none. The checksums of a
    PyTorch archive, which torch does not look at, must hold.

    Raises:
        ValueError: there is no such file, it is of another kind, it is damaged, it would have to run code to
            be read, it tells of more than it holds, or it does not hold named tensors of numbers. The message
            says what was found and the way out.
    """
    path = Path(path)
    kind = file_kind(path)
    if kind == "safetensors":
        _check_header(path)
        return _read_safetensors(path)
    _check_program(path, zipped=kind == "zip")
    return _named_tensors(path, _read_pytorch(path, mapped=kind == "zip"))


def file_kind(path: Path) -> str:
    """`safetensors`, `zip` (PyTorch since 1.6) or `pickle` (before that), by the first bytes of the file."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # a named pipe would keep whoever opens it waiting
            raise ValueError(f"{path} is {_SPECIAL.get(stat.S_IFMT(mode), 'no file')}; expected a file with weights")
        with path.open("rb") as file:
            head = file.read(512)
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


_SPECIAL = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Holds the values of `what` to what training leaves.

    Raises:
        ValueError: naming the tensors with an infinity or a value that is no number, with variances below zero, or with
            whole numbers where a network computes with fractions.
    """
    way_out = "these weights come from a training that diverged or from a damaged file: take an earlier checkpoint"
    if broken := not_finite(tensors):
        raise ValueError(f"{what}: {counted('tensor', broken)} with values that are not finite in float32; {way_out}")
    variances = {name: tensor for name, tensor in tensors.items() if name.endswith("running_var")}
    if negative := [name for name, tensor in variances.items() if tensor.numel() and tensor.min() < 0]:
        raise ValueError(f"{what}: {counted('tensor', negative)} with variances below zero; {way_out}")
    if whole := [name for name, t in tensors.items() if name.endswith(COMPUTED) and not t.is_floating_point()]:
        kinds = ", ".join(sorted({str(tensors[name].dtype).removeprefix("torch.") for name in whole}))
        raise ValueError(
            f"{what}: {counted('tensor', whole)} of {kinds}, which without their scales are no weights; expected float32, "
            "float16 or the like: take the file from before it was quantized"
        )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with an infinity or a value that is no number, in the float32 that models compute with.

    None of them is copied for it.
    """

    def finite(tensor: Tensor) -> bool:
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return True
        low, high = (float(bound) for bound in tensor.aminmax())  # either is NaN if any value is
        return low >= -LARGEST_FLOAT and high <= LARGEST_FLOAT

    return [name for name, tensor in tensors.items() if not finite(tensor)]


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
    listed = ", ".join(map(printable, names[:shown]))
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} ({listed}{more})"


def printable(name: str) -> str:
    """A name from a file as it may appear on a terminal: of bounded length, without control characters."""
    name = name if name.isprintable() else ascii(name)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


def _check_header(path: Path) -> None:
    """Refuses a safetensors header that is far too large, or that says one thing twice (of which one would win)."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > LARGEST_HEADER:
            raise ValueError(
                f"{path} is a damaged safetensors file: it begins with a header of {size:,} bytes, expected "
                f"less than {LARGEST_HEADER:,}; copy or download it again"
            )
        header = file.read(size)

    def once(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := [name for name, count in Counter(name for name, _ in entries).items() if count > 1]:
            raise ValueError(f"{path} is no proper safetensors file: it names {printable(twice[0])} twice")
        return dict(entries)

    try:
        json.loads(header, object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:100]
        raise ValueError(
            f"{path} is a damaged safetensors file: its header makes no sense ({reason}); copy or download it again"
        ) from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        reason = printable(str(error).strip())
        raise ValueError(f"{path} is a damaged safetensors file ({reason}); copy or download it again") from error
    _require_numbers(path, "", tensors)
    return tensors, metadata


def _check_program(path: Path, zipped: bool) -> None:
    """Refuses a PyTorch file that is more than tensors and plain data, before torch reads it."""
    size = path.stat().st_size
    if zipped:
        content, records = _open_archive(path, size)
    else:
        with path.open("rb") as file:
            content, records = file.read(LARGEST), None
    try:
        check_pickle(content, records, size)
    except Refused as error:
        found = str(error)
        if found.startswith(("asks for", "calls", "makes an object")):
            raise ValueError(
                f"{path} holds more than tensors and plain data (it {found}), and reading that could run any code; "
                "it was not read. If you trust where it comes from, load it yourself and save its state dict as "
                "safetensors."
            ) from error
        way_out = "Weights are plain tensors: convert it" if found.startswith("holds") else _AGAIN
        raise ValueError(f"{path} could not be read as a PyTorch checkpoint: it {found}. {way_out}") from error


_AGAIN = "If it should be one, copy or download it again."


def _open_archive(path: Path, size: int) -> tuple[bytes, dict[str, int]]:
    """The pickle in a PyTorch archive, and the bytes of each of its storages by name."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(path, size, entries)
            root = entries[0].filename.split("/")[0]
            pickled = archive.read(f"{root}/data.pkl")
            if any(entry.CRC for entry in entries) and (damaged := archive.testzip()):  # all 0: torch left them out
                raise zipfile.BadZipFile(f"the checksum of {damaged} does not hold")
    except (zipfile.BadZipFile, struct.error, EOFError, OSError, RuntimeError, ValueError) as error:
        if type(error) is ValueError:
            raise
        reason = printable(str(error))
        raise ValueError(f"{path} is cut short or damaged ({reason}); copy or download it again") from error
    prefix = f"{root}/data/"
    return pickled, {e.filename.removeprefix(prefix): e.file_size for e in entries if e.filename.startswith(prefix)}


def _check_entries(path: Path, size: int, entries: list[zipfile.ZipInfo]) -> None:
    """torch.save stores its records as they are; compressed ones cannot be mapped, and may unfold to any size."""
    names = [entry.filename for entry in entries]
    compressed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if compressed:
        raise ValueError(
            f"{path} is a compressed zip archive ({printable(compressed[0])}), not a PyTorch checkpoint: those are "
            "stored uncompressed. Unpack it and give the file that is inside."
        )
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(
            f"{path} could not be read as a PyTorch checkpoint: it holds {printable(twice)} twice. {_AGAIN}"
        )
    root = names[0].split("/")[0] if names else ""
    if f"{root}/constants.pkl" in names:
        raise ValueError(
            f"{path} is a TorchScript archive, a program and not only its weights; it was not read. If you trust where "
            "it comes from, load it with torch.jit.load and save its state dict as safetensors."
        )
    if f"{root}/data.pkl" not in names:
        raise ValueError(
            f"{path} could not be read as a PyTorch checkpoint: it is a zip archive of something else "
            f"({counted('file', names)}). Unpack it and give the file that is inside."
        )
    if (told := sum(entry.file_size for entry in entries)) > size:
        raise ValueError(f"{path} is damaged: it tells of {told:,} bytes of content and has {size:,}. {_AGAIN}")
    if (pickled := next(e.file_size for e in entries if e.filename == f"{root}/data.pkl")) > LARGEST:
        raise ValueError(f"{path} has a pickle of {pickled:,} bytes, expected less than {LARGEST:,}. {_AGAIN}")


def _read_pytorch(path: Path, mapped: bool) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a broken pickle can fail in any way at all
        reason = printable(str(error).splitlines()[0] if str(error) else "no details")
        raise ValueError(
            f"{path} could not be read as a PyTorch checkpoint ({type(error).__name__}: {reason}). {_AGAIN}"
        ) from error


def _named_tensors(path: Path, data: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; expected a dict of named tensors")
    wrapper = next((key for key in WRAPPERS if isinstance(data.get(key), dict)), None)
    named = data[wrapper] if wrapper else data
    under = f" under {wrapper!r}" if wrapper else ""
    others = [printable(str(name)) for name, value in named.items() if not _is_named_tensor(name, value)]
    if others or not named:
        found = f"entries that are not tensors ({', '.join(others[:5])})" if others else "nothing"
        raise ValueError(
            f"{path} holds {found}{under}; expected named tensors, at the "
            f"top level or under one of the keys {', '.join(map(repr, WRAPPERS))}"
        )
    _require_numbers(path, under, named)
    rest = {str(key): value for key, value in data.items() if key != wrapper} if wrapper else {}
    return {name: tensor.detach() for name, tensor in named.items()}, rest


def _is_named_tensor(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _require_numbers(path: Path, under: str, tensors: Mapping[str, Tensor]) -> None:
    """Tensors can be of kinds that weights never are, and that most of torch cannot count or compare."""
    others = [
        f"{printable(name)} of {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in tensors.items()
        if tensor.dtype not in NUMBERS or tensor.layout is not torch.strided or tensor.device.type != "cpu"
    ]
    if others:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in NUMBERS)
        raise ValueError(
            f"{path} holds tensors that are no weights{under} ({', '.join(others[:3])}); expected plain ones of {known}"
        )


def _describe(head: bytes) -> str:
    text = head.lstrip().lower()
    if not head:
        return "an empty file"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (`git lfs pull` fetches what it stands for)"
    if head[257:262] == b"ustar":
        return "a tar archive"
    for start, words in _SIGNATURES.items():
        if head.startswith(start):
            return words
    return f"a file that begins with {head[:8]!r}"


_SIGNATURES = {
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"PK\x05\x06": "an empty zip archive",
    b"\x89HDF": "an HDF5 file (Keras or MATLAB)",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF file",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"%PDF": "a PDF document",
}
