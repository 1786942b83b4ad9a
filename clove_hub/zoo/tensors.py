"""Reading weight files without ever executing their content.

A PyTorch checkpoint is a pickle, and a pickle is a program. It is read as data (`pickles.py`): tensors are built in
`stored.py`, anything else beside the weights becomes a note that is never called.

| container   | written by                               | where the numbers are                               |
|-------------|------------------------------------------|-----------------------------------------------------|
| safetensors | safetensors                              | behind a header of JSON                             |
| zip         | torch since 1.6                          | in records of an archive, each with a checksum      |
| pickle      | torch before 1.6                         | behind five pickles                                 |
| pickle      | Detectron2's converters, and ours        | in the pickle itself, as NumPy's arrays             |
"""

from __future__ import annotations

import json
import mmap
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checks import counted, printable
from .pickles import Placeholder, Refused, Span, read_pickle
from .stored import NUMBERS, Plain, Values, as_dict, is_tensor, storage_of, words

WRAPPERS = ("model", "state_dict")
"""Keys under which a PyTorch checkpoint may have the tensors of the network."""
AVERAGED = ("state_dict_ema", "model_ema")
"""Keys under which it may have their moving average, which its authors evaluate."""
BRANCHES = ("student", "teacher")
"""Keys under which it may have one network each; they are then part of the names, even if there is only one."""
MOST, MOST_ENTRIES = 20_000, 100
"""Maximum tensors of a network, and maximum other entries at the top level of a checkpoint."""
MAGIC = 0x1950A86A20F9469CFC6C
"""The first number in files of torch before 1.6."""
LARGEST_HEADER = 16 << 20
"""Maximum bytes of a safetensors header; a ResNet-50's has about forty thousand."""


class Contents(NamedTuple):
    """The content of a file."""

    tensors: dict[str, Tensor]
    """By name, on the CPU, in the type they were stored in."""
    rest: dict[str, Any]
    """Its other content: numbers, text, lists and dicts."""
    notes: tuple[str, ...] = ()
    """Which of several networks was chosen, in sentences."""


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The first two fields of `read_contents`."""
    return read_contents(path)[:2]


def read_contents(path: str | Path) -> Contents:
    """Read a file of weights; its kind is determined by its first bytes, not by its name.

    From a PyTorch checkpoint the tensors are those under `model` or `state_dict`, or their moving average if it is
    beside them; otherwise those of all networks in it, with their keys as prefixes of the names; otherwise those of the
    top level. They are memory-mapped, so that an optimizer state beside the network costs nothing.

    Raises:
        ValueError: there is no such file, it is of another kind or damaged, its weights are not tensors of numbers, or
            it would exhaust memory or time. The message says what was found and what to do.
    """
    path = Path(path)
    kind = file_kind(path)
    if kind == "safetensors":
        _check_header(path)
        return _read_safetensors(path)
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            data, values = _open_archive(path, file, mapped) if kind == "zip" else _open_pickle(file, mapped)
            return _choose(path, data, values)
    except Refused as error:
        way_out = _BY_YOURSELF if "a call of" in str(error) else _AGAIN
        raise ValueError(f"{path} could not be read as a PyTorch checkpoint: it {error}. {way_out}") from error


def file_kind(path: Path) -> str:
    """`safetensors`, `zip` (PyTorch since 1.6) or `pickle` (earlier, or NumPy's), by the first bytes of the file."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # opening a named pipe would block
            raise ValueError(f"{path} is {_SPECIAL.get(stat.S_IFMT(mode), 'not a file')}; expected a file with weights")
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


def _check_header(path: Path) -> None:
    """Reject a safetensors header that is far too large, or that has duplicate keys (of which one would win)."""
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
            raise ValueError(f"{path} is not a valid safetensors file: it names {printable(twice[0])} twice")
        return dict(entries)

    try:
        json.loads(header, object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:100]
        raise ValueError(
            f"{path} is a damaged safetensors file: its header is not valid ({reason}); copy or download it again"
        ) from error


def _read_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        reason = printable(str(error).strip())
        raise ValueError(f"{path} is a damaged safetensors file ({reason}); copy or download it again") from error
    _require_numbers(path, tensors)
    return Contents(tensors, metadata)


_AGAIN = "If it should be one, copy or download it again."
_BY_YOURSELF = (
    "Only plain tensors are read; nothing that a file names is called. If you trust where the file comes from, load it "
    "yourself and save its state dict as safetensors."
)


def _open_archive(path: Path, file: BinaryIO, mapped: mmap.mmap) -> tuple[Any, Values]:
    """The content of the pickle in a PyTorch archive, and the location of the archive's storages."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, struct.error, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is cut short or damaged ({printable(str(error))}); copy or download it again"
        ) from error
    _check_entries(path, len(mapped), entries)
    root = entries[0].filename.split("/")[0]
    # torch can omit the checksums (`set_crc32_options`); then all of them are 0.
    summed = any(entry.CRC for entry in entries)
    records = {entry.filename.removeprefix(f"{root}/"): _record(path, file, entry, summed) for entry in entries}
    mapped.seek(records["data.pkl"].start)
    data = read_pickle(mapped, [])
    if mapped.tell() > sum(records["data.pkl"]):
        raise Refused("is cut short or damaged: its pickle has no end")
    order = records.get("byteorder", Span(0, 0))
    places = {name.removeprefix("data/"): place for name, place in records.items() if name.startswith("data/")}
    return data, Values(file, mapped, places, swapped=mapped[order.start : sum(order)] == b"big")


def _record(path: Path, file: BinaryIO, entry: zipfile.ZipInfo, summed: bool) -> Span:
    """The location of a record's content, after verifying its checksum."""
    try:
        file.seek(entry.header_offset)
        header = file.read(30)
    except (OSError, OverflowError, ValueError):  # not a valid position in a file
        header = b""
    start = entry.header_offset + 30 + (sum(struct.unpack("<2H", header[26:])) if len(header) == 30 else 0)
    if header[:4] != b"PK\3\4" or entry.flag_bits & 1:
        problem = "is encrypted" if entry.flag_bits & 1 else "is not where the archive says"
        raise ValueError(f"{path} is cut short or damaged ({printable(entry.filename)} {problem}). {_AGAIN}")
    file.seek(start)
    found, left = 0, entry.file_size if summed else 0
    while left and (piece := file.read(min(left, 1 << 20))):
        found, left = zlib.crc32(piece, found), left - len(piece)
    if summed and found != entry.CRC:
        raise ValueError(
            f"{path} is damaged: the checksum of {printable(entry.filename)} is {found:08x}, and the archive says "
            f"{entry.CRC:08x}. {_AGAIN}"
        )
    return Span(start, entry.file_size)


def _check_entries(path: Path, size: int, entries: list[zipfile.ZipInfo]) -> None:
    """Reject compressed records: torch.save writes none; they cannot be mapped, and may expand to any size."""
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
            "the file comes from, load it with torch.jit.load and save its state dict as safetensors."
        )
    if f"{root}/data.pkl" not in names:
        raise ValueError(
            f"{path} could not be read as a PyTorch checkpoint: it is a zip archive of something else "
            f"({counted('file', names)}). Unpack it and give the file that is inside."
        )
    if (told := sum(entry.file_size for entry in entries)) > size:
        raise ValueError(f"{path} is damaged: it lists {told:,} bytes of content, but has {size:,}. {_AGAIN}")


def _open_pickle(file: BinaryIO, mapped: mmap.mmap) -> tuple[Any, Values]:
    """The content of a file from before torch 1.6, or of a pickle of NumPy arrays, and the location of its numbers."""
    storages: list[Placeholder] = []
    first = read_pickle(mapped, storages)
    if first != MAGIC:
        return first, Values(file, mapped, {})
    _, system, data, order = (read_pickle(mapped, storages) for _ in range(4))
    told: dict[str, tuple[torch.dtype, int]] = {}
    for key, dtype, count in map(storage_of, storages):
        if told.setdefault(key, (dtype, count)) != (dtype, count):
            raise Refused(f"describes the storage {printable(key)} in two ways")
    places, at = {}, mapped.tell()
    for key in order if isinstance(order, list) else ():
        dtype, count = told.pop(key) if isinstance(key, str) and key in told else (torch.uint8, -1)
        found = mapped[at : at + 8]
        if len(found) < 8 or int.from_bytes(found, "little") != count:
            raise Refused(f"is cut short or damaged: storage {printable(str(key))} is not where its pickle says")
        places[key] = Span(at + 8, count * dtype.itemsize)
        at = sum(places[key])
    if at > len(mapped):
        raise Refused(f"is cut short: it lists {at:,} bytes, but the file has {len(mapped):,}")
    return data, Values(file, mapped, places, swapped=isinstance(system, dict) and system.get("little_endian") is False)


def _choose(path: Path, data: Any, values: Values) -> Contents:
    """The network in the content of a checkpoint."""
    top = as_dict(data)
    if top is None:
        raise ValueError(f"{path} holds {words(data)}; expected a dict of named tensors. {_BY_YOURSELF}")
    itself = _is_network(top)
    if not itself and len(top) > MOST_ENTRIES:
        raise Refused(f"has {len(top):,} entries at its top level, where a checkpoint has about ten")
    wrapper = next((key for key in WRAPPERS if as_dict(top.get(key)) is not None), None)
    averaged = next((key for key in AVERAGED if _is_network(top.get(key))), None)
    notes: tuple[str, ...] = ()
    if averaged:
        keys, beside = [averaged], f", not those under {wrapper}" if wrapper else ""
        notes = (f"The weights are the moving average that the file has under {averaged}{beside}.",)
    elif wrapper or itself:
        keys = [wrapper] if wrapper else []
    else:
        keys = [key for key, value in top.items() if isinstance(key, str) and _is_network(value, key in BRANCHES)]
    if not keys:
        return Contents(_named_tensors(path, "", top, values), {})
    tensors: dict[str, Tensor] = {}
    for key in keys:
        prefix = f"{key.removesuffix('_state_dict')}." if keys[1:] or key in BRANCHES else ""
        named = _named_tensors(path, key, as_dict(top[key]) or {}, values)
        tensors |= {f"{prefix}{name}": tensor for name, tensor in named.items()}
    beside_them = {key: value for key, value in top.items() if key not in keys}
    return Contents(
        tensors, {Plain(values).key(key): Plain(values).of(value) for key, value in beside_them.items()}, notes
    )


def _is_network(note: Any, partly: bool = False) -> bool:
    """Whether it is a dict of tensors, for the most part or at least partly."""
    entries = as_dict(note) or {}
    found = sum(map(is_tensor, entries.values()))
    return found > 0 if partly else 2 * found > len(entries)


def _named_tensors(path: Path, key: str, entries: Mapping[Any, Any], values: Values) -> dict[str, Tensor]:
    under = f" under {key!r}" if key else ""
    others = [
        f"{printable(str(name))} is {words(value)}" if isinstance(name, str) else words(name)
        for name, value in entries.items()
        if not (isinstance(name, str) and is_tensor(value))
    ]
    if others or not entries:
        found = f"entries that are not tensors ({', '.join(others[:5])})" if others else "nothing"
        raise ValueError(
            f"{path} holds {found}{under}; expected named tensors, at the top level or under one of the keys "
            f"{', '.join(map(repr, WRAPPERS))}. {_BY_YOURSELF if 'a call of' in found else ''}".rstrip(". ")
        )
    if len(entries) > MOST:
        raise Refused(f"holds {len(entries):,} names of tensors{under}, where a ResNet has a few hundred")
    tensors = {}
    for name, note in entries.items():
        try:
            tensors[name] = values.tensor(note)
        except Refused as error:
            raise Refused(f"holds {error}{under} ({printable(name)})") from error
    return tensors


def _require_numbers(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Reject tensor types that weights never have, and that most of torch cannot count or compare."""
    others = [
        f"{printable(name)} of {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in tensors.items()
        if tensor.dtype not in NUMBERS.values() or tensor.layout is not torch.strided or tensor.device.type != "cpu"
    ]
    if others:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in NUMBERS.values())
        raise ValueError(
            f"{path} holds tensors that are not weights ({', '.join(others[:3])}); expected plain ones of {known}"
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
    for start, title in _SIGNATURES.items():
        if head.startswith(start):
            return title
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
