"""Files that are broken, or made to do harm.

Each is refused in words that say what was found, none is executed, and none costs more than a moment and a little memory.

It is long because it is a list. All files are opened in one process of its own, whose memory is measured; run as a program, this file is that process.
"""

from __future__ import annotations

import collections
import gzip
import io
import json
import lzma
import os
import pickle
import resource
import socket
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from patience import PATIENCE
from safetensors.torch import save_file
from torch import Tensor

from clove_hub.export.adopt import adopt
from clove_hub.export.inspect import inspect_source

MEMORY = 200 << 20
"""Bytes that reading all files one after the other may add; the largest of them has 47 MB."""


# ---- making files ----------------------------------------------------------------------------------------------------


class Makes:
    """In a pickle: the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Stored:
    """In a pickle: a reference to values in the archive."""

    def __init__(self, count: int, key: str = "0", kind: Any = torch.FloatStorage) -> None:
        self.told = ("storage", kind, key, "cpu", count, None)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.told if isinstance(obj, Stored) else None


def pickled(content: Any, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol).dump(content)
    return buffer.getvalue()


def archive(path: Path, pickle_: bytes, values: int = 16, **more: bytes) -> None:
    """As torch.save writes it: a pickle, and `values` float32 numbers."""
    with zipfile.ZipFile(path, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        file.writestr("archive/data.pkl", pickle_)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/data/0", bytes(4 * values))
        file.writestr("archive/version", "3\n")
        for name, content in more.items():
            file.writestr(name.replace("__", "/").replace("_pkl", ".pkl"), content)


def before_1_6(path: Path, content: Any, protocol: int = 2) -> None:
    """As torch.save wrote it before 1.6: a row of pickles."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    path.write_bytes(
        b"".join(pickled(part, protocol) for part in (*head, content, ["0"])) + struct.pack("<q", 16) + bytes(64)
    )


def tensor(
    size: Any = (2, 3), stride: Any = (3, 1), offset: Any = 0, stored: Stored | None = None, function: Any = None
) -> Makes:
    function = function or torch._utils._rebuild_tensor_v2
    return Makes(function, stored or Stored(16), offset, size, stride, False, collections.OrderedDict())


def safetensors(path: Path, header: Any, data: bytes = b"", size: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def resnet(path: Path, dtype: torch.dtype, **changes: Tensor | None) -> None:
    """A ResNet-18, small on disk, with some tensors changed or, where None, left out."""
    with torch.device("meta"):
        shapes = timm.create_model("resnet18", num_classes=0).state_dict()
    tensors = {
        name: torch.zeros(t.shape, dtype=dtype if t.is_floating_point() else t.dtype) for name, t in shapes.items()
    }
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}  # type: ignore[dict-item]
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def names_of(path: Path, *names: str) -> None:
    torch.save({"model": {name: torch.ones(2) for name in names}}, path)


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def saved(path: Path, share: float = 1.0, **options: Any) -> None:
    torch.save({"model": {f"layer{i}.weight": torch.ones(50, 4) for i in range(20)}}, path, **options)
    cut(path, share)


def saved_safely(path: Path, share: float) -> None:
    save_file({f"layer{i}.weight": torch.ones(50, 4) for i in range(20)}, path)
    cut(path, share)


def tar(path: Path, *names: str) -> None:
    with tarfile.open(path, "w") as file:
        for name in names:
            file.addfile(tarfile.TarInfo(name), io.BytesIO(b""))


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(20 << 20))


def overlapping(path: Path) -> None:
    """Ten thousand names for the same bytes."""
    archive(path, pickled({"a": tensor()}), values=10_000)
    with zipfile.ZipFile(path, "a") as file:
        first = file.getinfo("archive/data/0")
        for i in range(1, 5_000):
            again = zipfile.ZipInfo(f"archive/data/{i}")
            again.file_size, again.compress_size, again.CRC = first.file_size, first.compress_size, first.CRC
            again.header_offset = first.header_offset
            file.filelist.append(again)
        file._didModify = True  # type: ignore[attr-defined]


def larger_than_told(path: Path) -> None:
    """The list at the end tells of a gigabyte."""
    archive(path, pickled({"a": tensor()}))
    content = path.read_bytes()
    at = content.rindex(b"archive/data/0") - 46 + 20
    path.write_bytes(content[:at] + struct.pack("<II", 1 << 30, 1 << 30) + content[at + 8 :])


def encrypted(path: Path) -> None:
    archive(path, pickled({"a": tensor()}))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    content[6] |= 1
    path.write_bytes(content)


def laughs(depth: int = 25) -> list[Any]:
    """A list that names another ten times, which names another ten times, ..."""
    inner: list[Any] = ["ha"]
    for _ in range(depth):
        inner = [inner] * 10
    return inner


def copied_over_and_over() -> bytes:
    """A list of ten thousand pairs, and a thousand calls that make a dict of it."""
    pairs = pickled([(i % 256, None) for i in range(10_000)])[2:-1]
    call = b"ccollections\nOrderedDict\nh\x00\x85R"
    return b"\x80\x02(" + pairs + call * 1_000 + b"t."


def deep(opener: bytes, closer: bytes, depth: int = 100_000) -> bytes:
    """As `{"a": ((((...))))}`."""
    return b"\x80\x02}X\x01\x00\x00\x00a" + opener + closer * depth + b"s."


def array(size: Any = (4,), raw: Any = bytes(16)) -> Makes:
    kind = Makes(np.dtype, "f4", False, True)
    return Makes(np._core.numeric._frombuffer, raw, kind, size, "C")


def many_names(count: int) -> bytes:
    one = pickled({"a": tensor((0,), (1,))})
    more = b"".join(b"X\x05\x00\x00\x00%05dj\x00\x01\x00\x00" % n for n in range(1, count))
    return one[:-2] + b"r\x00\x01\x00\x00s(" + more + b"u."


def flipped(path: Path) -> None:
    saved(path)
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<f", 1.0) * 8)] ^= 1
    path.write_bytes(content)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    """A socket; its name must be short."""
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def unreadable(path: Path) -> None:
    saved(path)
    path.chmod(0)


DEEP_LIST = b"]" * 100_001 + b"a" * 100_000
CANARY = "canary"
"""The folder that a file of these makes if it is ever executed, where the process stands."""
CODE = Makes(os.mkdir, CANARY)
CALLS = r"holds .*\ba call of {}\b.*nothing that a file names is called\. If you trust"
NOT_READ = "could not be read as a PyTorch checkpoint: it "
WEIGHTS = {"a": torch.ones(2)}
MKDIR = CALLS.format(r"(posix|nt)\.mkdir")


class Special(torch.Tensor):
    """Of a class that is defined here."""


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    # ---- files that would run code
    "code for the weights": (lambda p: torch.save({"model": CODE}, p), MKDIR),
    "code among the weights": (lambda p: torch.save({"model": {**WEIGHTS, "b": CODE}}, p), MKDIR),
    "code among the student's": (
        lambda p: torch.save({"student": {**WEIGHTS, "b": CODE}, "teacher": WEIGHTS}, p),
        MKDIR,
    ),
    "code before 1.6": (lambda p: before_1_6(p, {"model": {"a": tensor(), "b": CODE}}), MKDIR),
    "code in a plain pickle": (lambda p: p.write_bytes(pickled(CODE)), MKDIR),
    **{
        f"code by protocol {n}": (lambda p, n=n: p.write_bytes(pickled(CODE, n)), MKDIR)  # type: ignore[misc]
        for n in (3, 4, 5)
    },
    "code by protocol 4 in an archive": (lambda p: archive(p, pickled(CODE, 4)), MKDIR),
    "code by protocol 4 before 1.6": (lambda p: before_1_6(p, {"a": tensor(), "b": CODE}, 4), MKDIR),
    "code by protocol 0": (lambda p: p.write_bytes(pickled(CODE, 0)), r"is a file that begins with b'c(posix|nt)"),
    "code as a hook of a tensor": (
        lambda p: archive(
            p, pickled({"a": Makes(torch._utils._rebuild_tensor_v2, Stored(16), 0, (1,), (1,), True, CODE)})
        ),
        MKDIR,
    ),
    "code for the wish for a gradient": (
        lambda p: archive(p, pickled({"a": Makes(torch._utils._rebuild_tensor_v2, Stored(16), 0, (1,), (1,), CODE)})),
        MKDIR,
    ),
    "code as a hook of a parameter": (
        lambda p: archive(p, pickled({"a": Makes(torch._utils._rebuild_parameter, tensor(), True, CODE)})),
        MKDIR,
    ),
    "code for an array's numbers": (
        lambda p: p.write_bytes(pickled({"a": array(raw=CODE)}, 4)),
        "numbers that are not bytes",
    ),
    "an array of objects": (lambda p: p.write_bytes(pickle.dumps({"a": np.array([{}])}, 4)), "holds an array of O8"),
    "an array of more than there is": (
        lambda p: p.write_bytes(pickled({"a": array((10**12,))}, 4)),
        r"an array \(1000000000000,\) of 16 bytes",
    ),
    "attributes of a tensor": (
        lambda p: archive(p, pickled({"a": tensor()})[:-2] + b"}bs."),
        CALLS.format(r"torch\._utils\._rebuild_tensor_v2"),
    ),
    "entries of a tensor": (
        lambda p: archive(p, pickled({"a": tensor()})[:-2] + b"K\x00K\x01ss."),
        CALLS.format(r"torch\._utils\._rebuild_tensor_v2"),
    ),
    "code by INST": (
        lambda p: archive(p, b"\x80\x02(X\x06\x00\x00\x00canaryios\nmkdir\n."),
        CALLS.format(r"os\.mkdir"),
    ),
    "code by OBJ": (
        lambda p: archive(p, b"\x80\x02(cos\nmkdir\nX\x06\x00\x00\x00canaryo."),
        CALLS.format(r"os\.mkdir"),
    ),
    "code by a name of Python 2": (
        lambda p: archive(p, b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R."),
        CALLS.format(r"builtins\.eval"),
    ),
    "code by an extension code": (
        lambda p: archive(p, b"\x80\x02\x82\x01."),
        "holds copyreg extension 1; expected a dict",
    ),
    "code by a name that is computed": (
        lambda p: archive(p, b"\x80\x04}}\x93."),
        NOT_READ + "refers to something whose name is not text",
    ),
    "code by what getattr gives": (
        lambda p: torch.save({"x": Makes(getattr, WEIGHTS, "keys")}, p),
        CALLS.format(r"builtins\.getattr"),
    ),
    "a call of a storage": (
        lambda p: archive(p, pickled({"a": Makes(torch.FloatStorage, 10**11)})),
        CALLS.format(r"torch\.FloatStorage"),
    ),
    "a call of the result of a call": (
        lambda p: archive(p, b"\x80\x02ccollections\nOrderedDict\n)R)R."),
        CALLS.format(r"what collections\.OrderedDict returns"),
    ),
    "weights in a class of somebody's": (
        lambda p: torch.save({"model": collections.Counter({"a": 1})}, p),
        CALLS.format(r"collections\.Counter"),
    ),
    "bytes out of band": (
        lambda p: archive(p, b"\x80\x05\x97."),
        NOT_READ + "uses the pickle instruction NEXT_BUFFER, which refers to something outside the file",
    ),
    "attributes of what is no object": (
        lambda p: archive(p, b"\x80\x02}}b."),
        NOT_READ + "sets attributes on a value that is not an object",
    ),
    "TorchScript": (
        lambda p: archive(p, pickled({}), archive__constants_pkl=pickled(()), archive__code__x=b"def f(): ..."),
        "is a TorchScript archive, a program and not only its weights; it was not read",
    ),
    "two pickles of one name": (
        lambda p: archive(p, pickled({}), archive__data_pkl=pickled(CODE)),
        r"holds archive/data\.pkl twice",
    ),
    # ---- files that would take up memory or time
    "a compressed zip bomb": (compressed, r"is a compressed zip archive \(archive/data\.pkl\)"),
    "a zip bomb of overlapping files": (overlapping, r"lists 20\d,\d+,\d+ bytes of content, but has \d+,\d+"),
    "a zip file that tells of more than it has": (
        larger_than_told,
        r"(lists 1,073,\d+,\d+ bytes|is cut short or damaged)",
    ),
    "a pickle of 17 MB": (
        lambda p: archive(p, b"\x80\x02" + b"N" * (17 << 20) + b"."),
        "has a pickle of more than 1,000,000 instructions",
    ),
    "a text of 17 MB": (
        lambda p: p.write_bytes(b"\x80\x02X" + struct.pack("<I", 17 << 20) + bytes(17 << 20) + b"."),
        r"holds \S{,100}; expected a dict",
    ),
    "a pickle of ten million instructions": (
        lambda p: archive(p, b"\x80\x02" + b"N" * 10_000_000 + b"."),
        "has a pickle of more than 1,000,000 instructions",
    ),
    "one value shown a million million times": (
        lambda p: archive(p, pickled({"a": tensor((10**6, 10**6), (0, 0))})),
        r"holds a tensor \(1000000, 1000000\) of 1,000,000,000,000 values",
    ),
    "a storage of more than there is": (
        lambda p: archive(p, pickled({"a": tensor((10**12,), (1,), stored=Stored(10**12))})),
        "holds a storage 0 of 4,000,000,000,000 bytes, of which the file holds 64",
    ),
    "a storage of more than there is, before 1.6": (
        lambda p: before_1_6(p, {"a": tensor((10**12,), (1,), stored=Stored(10**12))}),
        "is cut short or damaged: storage 0 is not where its pickle says",
    ),
    "a storage that is not there": (
        lambda p: archive(p, pickled({"a": tensor(stored=Stored(16, "secret"))})),
        "holds a storage secret of 64 bytes, of which the file holds none",
    ),
    "a storage told of in two ways": (
        lambda p: before_1_6(p, {"a": tensor(), "b": tensor(stored=Stored(16, kind=torch.IntStorage))}),
        "describes the storage 0 in two ways",
    ),
    "a thousand tensors in one storage": (
        lambda p: archive(
            p, pickled({f"a{i}": tensor((100_000,), (1,), stored=Stored(100_000)) for i in range(1_000)}), 100_000
        ),
        r"holds tensors of 2,000,000 bytes together, but the file has \d{3},\d{3}",
    ),
    "a tensor beyond its storage": (
        lambda p: archive(p, pickled({"a": tensor(offset=14)})),
        "up to place 20 of a storage that has 16",
    ),
    "a tensor with long strides": (
        lambda p: archive(p, pickled({"a": tensor((2, 2), (10**9, 1))})),
        "of a storage that has 16",
    ),
    "a tensor of a size below zero": (
        lambda p: archive(p, pickled({"a": tensor((-1, 3))})),
        "something other than .* whole numbers",
    ),
    "a tensor of half a size": (
        lambda p: archive(p, pickled({"a": tensor((1.5, 3))})),
        "something other than .* whole numbers",
    ),
    "a tensor of a hundred dimensions": (
        lambda p: archive(p, pickled({"a": tensor((1,) * 100, (1,) * 100)})),
        "a tensor of 100 dimensions",
    ),
    "a tensor of fewer strides": (
        lambda p: archive(p, pickled({"a": tensor((2, 3), (1,))})),
        "of 2 dimensions and 1 strides",
    ),
    "a tensor of nothing stored": (
        lambda p: archive(p, pickled({"a": tensor(stored="0")})),
        "holds a tensor of 0 instead of stored values",
    ),  # type: ignore[arg-type]
    "lists that name each other": (
        lambda p: archive(p, pickled({"model": {"a": laughs()}})),
        r"entries that are not tensors \(a is a list\)",
    ),
    "a dict copied over and over": (lambda p: archive(p, copied_over_and_over()), "holds a tuple; expected a dict"),
    "thirty thousand names of one tensor": (
        lambda p: archive(p, many_names(30_000)),
        "holds 30,000 names of tensors, where a ResNet has a few hundred",
    ),
    "a thousand entries at the top": (
        lambda p: archive(p, pickled({"model": {"a": tensor()}, **dict.fromkeys(map(str, range(1_000)))})),
        "has 1,001 entries at its top level, where a checkpoint has about ten",
    ),
    "a place far up in the memo": (lambda p: archive(p, b"\x80\x02}r\xf0\xff\xff\xff."), "holds nothing"),
    "a number of two gigabytes": (
        lambda p: archive(p, b"\x80\x02\x8b\xff\xff\xff\x7f."),
        NOT_READ + "is cut short or damaged",
    ),
    "bytes of a terabyte that are not there": (
        lambda p: p.write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"."),
        NOT_READ + "is cut short or damaged",
    ),
    "bytes of a terabyte": (
        lambda p: archive(p, pickled({"a": Makes(bytearray, 10**12)})),
        CALLS.format(r"builtins\.bytearray"),
    ),
    "tuples a hundred thousand deep": (lambda p: archive(p, deep(b")", b"\x85")), r"\(a is a tuple\)"),
    "lists a hundred thousand deep": (
        lambda p: archive(p, b"\x80\x02" + b"](" * 50_000 + b"e" * 50_000 + b"."),
        "holds a list; expected a dict",
    ),
    "lists a hundred thousand deep beside the weights": (
        lambda p: archive(p, pickled({"model": {"a": tensor()}})[:-1] + b"X\x01\x00\x00\x00x" + DEEP_LIST + b"s."),
        "has lists or dicts nested more than 100 deep",
    ),
    "a tuple as a name": (lambda p: archive(p, b"\x80\x02})K\x01s."), r"entries that are not tensors \(a tuple\)"),
    "a deep tuple as a name": (
        lambda p: archive(p, b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s."),
        r"entries that are not tensors \(a tuple\)",
    ),
    "a list as a key": (lambda p: archive(p, b"\x80\x02}]K\x01s."), "is not valid .*unhashable"),
    # ---- safetensors
    "a header of 2 ** 62 bytes": (
        lambda p: safetensors(p, {}, size=2**62),
        "a header of 4,611,686,018,427,387,904 bytes",
    ),
    "a header of 17 MB": (lambda p: safetensors(p, b"{" + b" " * (17 << 20)), "a header of 17,825,793 bytes"),
    "a header longer than the file": (lambda p: safetensors(p, {}, size=5000), "is a damaged safetensors file"),
    "a header that is no JSON": (lambda p: safetensors(p, b"{'a': 1}"), "its header is not valid"),
    "a header of deep lists": (
        lambda p: safetensors(p, b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
        "its header is not valid",
    ),
    "a name twice in the header": (
        lambda p: safetensors(p, b'{"a":%b,"a":%b}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), bytes(4)),
        "it names a twice",
    ),
    "a tensor of a million million values": (
        lambda p: safetensors(p, {"a": entry([10**12], 0, 4)}, bytes(4)),
        "damaged safetensors",
    ),
    "a tensor far beyond the file": (
        lambda p: safetensors(p, {"a": entry([10**12], 0, 4 * 10**12)}),
        "damaged safetensors",
    ),
    "a size that overflows": (
        lambda p: safetensors(p, {"a": entry([2**40, 2**40], 0, 4)}, bytes(4)),
        "damaged safetensors",
    ),
    "an empty tensor of a huge shape": (
        lambda p: safetensors(p, {"conv1.weight": entry([0, 2**62], 0, 0)}),
        "is not a .*ResNet",
    ),
    "tensors that overlap": (
        lambda p: safetensors(p, {"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)),
        "damaged safetensors",
    ),
    "a tensor that ends before it begins": (
        lambda p: safetensors(p, {"a": entry([1], 8, 4)}, bytes(8)),
        "damaged safetensors",
    ),
    "bytes of no tensor": (lambda p: safetensors(p, {"a": entry([1], 0, 4)}, bytes(80)), "damaged safetensors"),
    "an unknown type": (lambda p: safetensors(p, {"a": entry([1], 0, 4, "F99")}, bytes(4)), "damaged safetensors"),
    "metadata that is no text": (lambda p: safetensors(p, {"__metadata__": {"a": [1]}}), "damaged safetensors"),
    "complex numbers in safetensors": (
        lambda p: save_file({"a": torch.ones(2, dtype=torch.complex64)}, p),
        r"not weights \(a of complex64\)",
    ),
    "numbers of eight bits": (
        lambda p: save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, p),
        r"not weights \(a of float8_e4m3fn\); expected plain ones of float64",
    ),
    # ---- tensors that are no weights
    "sparse": (
        lambda p: torch.save({"a": torch.eye(3).to_sparse()}, p),
        NOT_READ + r"holds a call of torch\._utils\._rebuild_sparse_tensor \(a\)\. Only plain tensors",
    ),
    "sparse by rows": (
        lambda p: torch.save({"a": torch.eye(3).to_sparse_csr()}, p),
        NOT_READ + r"holds a call of torch\._utils\._rebuild_sparse_tensor \(a\)\. Only plain tensors",
    ),
    "quantized": (
        lambda p: archive(p, pickled({"a": Makes(torch._utils._rebuild_qtensor, 1)})),
        NOT_READ + "holds a call of .*rebuild_qtensor",
    ),
    "complex": (
        lambda p: torch.save({"a": torch.ones(2, dtype=torch.complex64)}, p),
        NOT_READ + "holds stored values of the unknown kind torch.ComplexFloatStorage",
    ),
    "without values": (
        lambda p: torch.save({"a": torch.ones(10**6, 10**6, device="meta")}, p),
        "holds a call of .*rebuild_meta_tensor_no_storage",
    ),
    "of a class of one's own": (
        lambda p: torch.save({"a": torch.ones(2).as_subclass(Special)}, p),
        "holds a call of .*rebuild_from_type_v2",
    ),
    # ---- tensors that are no backbone
    "a value that is no number": (
        lambda p: resnet(p, torch.float32, bn1__bias=torch.full((64,), torch.nan)),
        r"1 tensor \(bn1\.bias\) with non-finite values",
    ),
    "an infinite value": (
        lambda p: resnet(p, torch.float32, bn1__weight=torch.full((64,), -torch.inf)),
        r"1 tensor \(bn1\.weight\) with non-finite values",
    ),
    "a tensor too few": (
        lambda p: resnet(p, torch.float16, bn1__bias=None),
        r"closest to resnet18, but has 1 missing tensor \(bn1\.bias\)",
    ),
    "a tensor too many": (
        lambda p: resnet(p, torch.float16, more=torch.ones(1)),
        r"but has 1 unexpected tensor \(more\)",
    ),
    "a tensor of another shape": (
        lambda p: resnet(p, torch.float16, bn1__bias=torch.ones(65)),
        r"bn1\.bias \(65,\) instead of \(64,\)",
    ),
    "double precision in one tensor": (
        lambda p: resnet(p, torch.float32, bn1__bias=torch.ones(64, dtype=torch.float64)),
        "is stored in float64, but a bundle holds float32",
    ),
    "a detector of torchvision": (
        lambda p: names_of(p, "backbone.body.conv1.weight", "rpn.head.conv.weight", "roi_heads.box_head.fc6.weight"),
        "is a torchvision detector, not a ResNet",
    ),
    "Detectron2's Mask R-CNN with a pyramid": (
        lambda p: names_of(p, "backbone.bottom_up.stem.conv1.weight", "proposal_generator.rpn_head.conv.weight"),
        "is a Detectron2 detector, not a ResNet",
    ),
    "Detectron2's Mask R-CNN of C4": (
        lambda p: names_of(
            p, "backbone.stem.conv1.weight", "backbone.res2.0.conv1.weight", "roi_heads.res5.0.conv1.weight"
        ),
        "is a Detectron2 detector, not a ResNet",
    ),
    "a detector of MMDetection": (
        lambda p: names_of(p, "backbone.conv1.weight", "neck.lateral_convs.0.conv.weight", "rpn_head.rpn_cls.weight"),
        "is an MMDetection detector, not a ResNet: found 3 tensors such as backbone.conv1.weight",
    ),
    "a vision transformer": (
        lambda p: torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), p),
        "is a vision transformer, not a ResNet: found 152 tensors such as cls_token",
    ),
    "a ConvNeXt": (
        lambda p: torch.save(timm.create_model("convnext_atto").state_dict(), p),
        "is a ConvNeXt, not a ResNet",
    ),
    "a language model": (lambda p: names_of(p, "model.embed_tokens.weight"), "is a language model, not a ResNet"),
    "the state of a run": (
        lambda p: names_of(p, "student.backbone.conv1.weight", "teacher.backbone.conv1.weight"),
        r"is the whole state of a run \(give the run's folder\), not a ResNet",
    ),
    "names that a terminal would obey": (
        lambda p: names_of(p, "\x1b[2J\x07" + "x" * 10_000),
        r"such as '\\x1b\[2J\\x07x+\.\.\.; expected",
    ),
    # ---- broken and other files
    "an empty file": (lambda p: p.write_bytes(b""), "is an empty file"),
    "zeros": (lambda p: p.write_bytes(bytes(1000)), "is a file that begins with"),
    "a web page": (
        lambda p: p.write_text("\n<!doctype html><title>Quota exceeded"),
        "is a web page.*Was the download complete",
    ),
    "a pointer of Git LFS": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "a Git LFS pointer",
    ),
    "a gzip archive": (lambda p: p.write_bytes(gzip.compress(bytes(100))), "is a gzip archive"),
    "an xz archive": (lambda p: p.write_bytes(lzma.compress(bytes(100))), "is an xz archive"),
    "a tar archive": (lambda p: tar(p, "resnet.pth"), "is a tar archive"),
    "torch's first format": (lambda p: tar(p, "sys_info", "pickle", "tensors", "storages"), "is a tar archive"),
    "a picture": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)), "is a picture"),
    "Keras": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "is an HDF5 file"),
    "an empty zip archive": (lambda p: zipfile.ZipFile(p, "w").close(), "is an empty zip archive"),
    "a zip archive of something else": (
        lambda p: __import__("numpy").savez(p.open("wb"), a=[1]),
        r"zip archive of something else \(1 file \(a\.npy\)",
    ),
    "an encrypted archive": (encrypted, r"is cut short or damaged \(.*encrypted"),
    "an archive with a bit that fell over": (
        flipped,
        r"is damaged: the checksum of \w+/data/0 is [0-9a-f]{8}, and the archive says [0-9a-f]{8}",
    ),
    "an archive cut in its values": (lambda p: saved(p, 0.4), "is cut short or damaged"),
    "an archive cut in its list of files": (lambda p: saved(p, 0.9), "is cut short or damaged"),
    "an archive cut at its end": (lambda p: saved(p, 0.999), "is cut short or damaged"),
    "an old file cut in its pickle": (
        lambda p: saved(p, 0.02, _use_new_zipfile_serialization=False),
        "is cut short or damaged",
    ),
    "an old file cut in its values": (
        lambda p: saved(p, 0.6, _use_new_zipfile_serialization=False),
        r"is cut short or damaged: storage \d+ is not where its pickle says",
    ),
    "an old file cut at its end": (
        lambda p: saved(p, 0.99, _use_new_zipfile_serialization=False),
        "is cut short: it lists",
    ),
    "safetensors cut in the header": (lambda p: saved_safely(p, 0.02), "damaged safetensors"),
    "safetensors cut in the values": (lambda p: saved_safely(p, 0.9), "damaged safetensors"),
    "a pickle of something else": (
        lambda p: p.write_bytes(pickled({"a": [1]})),
        r"holds entries that are not tensors \(a is a list\); expected named tensors",
    ),
    "a list of tensors": (lambda p: torch.save([torch.ones(1)], p), "holds a list; expected a dict of named tensors"),
    "no tensors": (lambda p: torch.save({"model": {}}, p), "holds nothing under 'model'"),
    "names that are numbers": (lambda p: torch.save({0: torch.ones(1)}, p), r"entries that are not tensors \(0\)"),
    "a name twice in a pickle": (
        lambda p: archive(p, b"\x80\x02}X\x01\x00\x00\x00aK\x01sX\x01\x00\x00\x00aK\x02s."),
        NOT_READ + "names a twice",
    ),
    "an empty folder": (lambda p: p.mkdir(), "is a folder; expected a file with weights"),
    "a named pipe": (pipe, "is a named pipe; expected a file with weights"),
    "a socket": (listening, "is a socket; expected a file with weights"),
    "a device": (lambda p: p.symlink_to("/dev/zero"), "is a device; expected a file with weights"),
    "a link to itself": (lambda p: p.symlink_to(p.name), "cannot read .*: Too many levels of symbolic links"),
    "a link to nothing": (lambda p: p.symlink_to("nowhere"), "cannot read .*: No such file"),
    "a file that one may not read": (unreadable, "cannot read .*: Permission denied"),
}
"""What each file is, how it is made, and what the refusal says."""


# ---- opening them ----------------------------------------------------------------------------------------------------


def open_all(folder: Path) -> dict[str, Any]:
    """What became of each file, and how much memory was needed at most."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir(), key=lambda path: int(path.name)):
        start = time.process_time()
        try:
            adopt(path, "resnet18.hostile", folder.parent / "bundle", license="mit")
            refusal = None
        except ValueError as error:
            refusal = str(error)
        seconds = time.process_time() - start  # of the processor, which other tests may keep waiting
        found[path.name] = {"refusal": refusal, "seconds": seconds, "inspected": inspect_source(path).refused}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"files": found, "memory": (peak - before) * (1 if sys.platform == "darwin" else 1024)}


if __name__ == "__main__":
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + (4 << 30),) * 2)  # a bomb must not take the machine along
    print(json.dumps(open_all(Path(sys.argv[1]))))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "files").mkdir()
    for number, (make, _) in enumerate(CASES.values()):
        make(folder / "files" / str(number))
    done = subprocess.run(
        [sys.executable, __file__, folder / "files"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,  # nothing waits for ever
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    left = sorted(path.name for path in folder.iterdir())
    return {**result, "left": left}


@pytest.mark.parametrize("number", range(len(CASES)), ids=list(CASES))
def test_a_hostile_or_broken_file_is_refused_in_words_that_say_what_was_found(
    opened: Mapping[str, Any], number: int
) -> None:
    name, (_, message) = list(CASES.items())[number]
    if name == "a file that one may not read" and os.geteuid() == 0:
        pytest.skip("the superuser may read every file")
    found = opened["files"][str(number)]
    assert found["refusal"] is not None, "it was taken"
    with pytest.raises(ValueError, match=message):
        raise ValueError(found["refusal"])
    assert found["inspected"] is not None or "a bundle holds float32" in found["refusal"]
    assert found["seconds"] < 5
    assert "\x1b" not in found["refusal"]
    assert len(found["refusal"]) < 1000 + 3 * len(str(opened))  # and is no page of text


def test_none_of_them_is_executed_and_nothing_is_written(
    opened: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert opened["left"] == ["files"]
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickled(CODE))  # the canary sings where it is let
    assert (tmp_path / CANARY).is_dir()


def test_all_of_them_together_take_little_memory(opened: Mapping[str, Any]) -> None:
    assert opened["memory"] < MEMORY


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 60
