"""Tensors and plain data from the notes of a pickle (`pickles.py`), by a table of the few constructors that matter.

Tensors look into the mapped file wherever its numbers lie as the processor wants them; nothing else is copied.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .pickles import RESULT, STORAGE, TUPLE, Placeholder, Refused, Span, shown

NUMBERS = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
"""Types of stored weights and counters, by torch's names of their storages."""
ARRAYS = {"f8": torch.float64, "f4": torch.float32, "f2": torch.float16, "i8": torch.int64, "i4": torch.int32} | {
    "i2": torch.int16,
    "i1": torch.int8,
    "u1": torch.uint8,
    "b1": torch.bool,
}
"""The same by NumPy's names."""
STRIDED = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
TYPED = "torch._tensor._rebuild_from_type_v2"
TENSORS = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
ARRAY, BUFFER = "numpy._core.multiarray._reconstruct", "numpy._core.numeric._frombuffer"
SCALAR = "numpy._core.multiarray.scalar"
BYTES = ("_codecs.encode", "builtins.bytes", "builtins.bytearray")
CONTAINERS = (
    TUPLE,
    *BYTES,
    "builtins.set",
    "builtins.frozenset",
    "collections.OrderedDict",
    "collections.deque",
    "torch.Size",
)
"""Types that are made from one value, and printed as that value."""
OMEGACONF = ("_content", "_val")
"""Attributes of a configuration's nodes that hold its values."""
DEEPEST = 100
"""Lists and dicts within each other, outside the weights."""
MOST = 10_000
"""Maximum values kept of each item beside the weights."""
SMALL = 100
"""Maximum numbers kept of an array."""


def as_dict(note: Any) -> dict[Any, Any] | None:
    """The entries of a dict; None if it is not one, or of a class with unknown behavior."""
    if isinstance(note, dict):
        return note
    if not isinstance(note, Placeholder) or note.name != "collections.OrderedDict" or note.items:
        return None
    if note.arguments:  # a list of pairs, as Python 2 wrote it
        pairs = note.arguments[0]
        if not isinstance(pairs, list) or not all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
        ):
            return None
        note.entries, note.arguments = dict(pairs) | note.entries, ()
    return note.entries if note.arguments == () else None


def is_tensor(note: Any) -> bool:
    """Whether it claims to be a tensor or an array; `Values.tensor` checks whether it is one."""
    return isinstance(note, Placeholder) and (
        note.name in (ARRAY, BUFFER) or note.name.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_"))
    )


@dataclass
class Values:
    """The numbers of a file, open as long as tensors are created from it."""

    file: BinaryIO
    mapped: mmap.mmap
    """The file as a private mapping: writes to its memory do not change the file."""
    places: Mapping[str, Span]
    """The bytes of each storage, by its key."""
    swapped: bool = False
    """Whether the storages were written with the first byte first."""
    claimed: int = 0
    """Bytes that all tensors created so far refer to."""

    def tensor(self, note: Any) -> Tensor:
        """The tensor that the note stands for, in the type that it was stored in.

        Raises:
            Refused: it is not a plain tensor, depends on more than stored numbers, or is larger than its storage.
        """
        if not isinstance(note, Placeholder):
            raise Refused(words(note))
        name, arguments = note.name, note.arguments or ()
        inner: Any = arguments[0] if name in PARAMETERS and len(arguments) >= 3 else None
        if is_tensor(inner) and inner.name not in PARAMETERS:
            _require_inert(arguments[1:3])
            return self.tensor(inner)
        if name == TYPED and len(arguments) == 4 and isinstance(arguments[0], Placeholder):
            function, kind, arguments, _ = arguments
            name = function.name if isinstance(kind, Placeholder) and kind.name in TENSORS else name
        try:
            if name == ARRAY and isinstance(note.state, tuple) and len(note.state) == 5 and not note.entries:
                _, size, kind, fortran, raw = note.state
                return self.array(raw, kind, _sizes(size), fortran is True)
            if name == BUFFER and len(arguments) == 4 and note.state is None:
                raw, kind, size, order = arguments
                return self.array(raw, kind, _sizes(size), order == "F")
            if name in STRIDED and len(arguments) >= 4 and note.state is None and not note.entries:
                _require_inert(arguments[4:])
                storage, offset, size, stride = arguments[:4]
                return self.strided(storage, offset, _sizes(size), _sizes(stride))
        except (RuntimeError, ValueError, TypeError, OverflowError) as error:
            raise Refused(f"a tensor that torch cannot build ({error!s:.80})") from error
        raise Refused(words(note))

    def strided(self, storage: Any, offset: Any, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        """A view of a storage, with at most as many values."""
        if len(size) != len(stride):
            raise Refused(f"a tensor of {len(size)} dimensions and {len(stride)} strides")
        (offset,) = _sizes((offset,))
        key, dtype, count = storage_of(storage)
        place = self.places.get(key)
        if place is None or place.size != count * dtype.itemsize:
            held = f"{place.size:,}" if place else "none"
            raise Refused(f"a storage {shown(key)} of {count * dtype.itemsize:,} bytes, of which the file holds {held}")
        total = math.prod(size)
        reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if total else offset
        if max(total, reach) > count:
            raise Refused(
                f"a tensor {shown(str(size))} of {total:,} values up to place {reach:,} of a storage that has {count:,}"
            )
        start = place.start + offset * dtype.itemsize
        return self.numbers(None, start, reach - offset, dtype, self.swapped).as_strided(size, stride)

    def array(self, raw: Any, kind: Any, size: tuple[int, ...], fortran: bool) -> Tensor:
        """A NumPy array, with its numbers in the pickle itself."""
        dtype, swapped = _numpy_type(kind)
        content, start, length = self.raw(raw)
        if math.prod(size) * dtype.itemsize != length:
            raise Refused(f"an array {shown(str(size))} of {length:,} bytes")
        flat = self.numbers(content, start, math.prod(size), dtype, swapped)
        return flat.view(size[::-1]).permute(*range(len(size))[::-1]) if fortran else flat.view(size)

    def raw(self, note: Any) -> tuple[bytearray | None, int, int]:
        """Bytes: their buffer (None for the file), their start, and their number.

        Python 2 and protocol 2 write them as text.
        """
        if isinstance(note, Placeholder) and note.name in BYTES:
            note = note.arguments[0] if note.arguments else b""
        if isinstance(note, Span):
            return None, note.start, note.size
        content = note.encode("latin-1", "replace") if isinstance(note, str) else note
        if not isinstance(content, bytes):
            raise Refused("numbers that are not bytes")
        return bytearray(content), 0, len(content)

    def numbers(self, content: bytearray | None, start: int, count: int, dtype: torch.dtype, swapped: bool) -> Tensor:
        """Contiguous numbers, in a buffer or, if it is None, in the file."""
        size = count * dtype.itemsize
        self.claimed += size
        if self.claimed > 4 * len(self.mapped):  # shared weights count twice
            raise Refused(f"tensors of {self.claimed:,} bytes together, but the file has {len(self.mapped):,}")
        if not count:
            return torch.empty(0, dtype=dtype)
        if content is None and start % dtype.itemsize:
            flat = torch.empty(size, dtype=torch.uint8)
            self.file.seek(start)
            self.file.readinto(flat.numpy())  # type: ignore[attr-defined]
        else:
            flat = torch.frombuffer(
                self.mapped if content is None else content, dtype=torch.uint8, count=size, offset=start
            )
        return (flat.view(count, dtype.itemsize).flip(1).flatten() if swapped else flat).view(dtype)


def storage_of(note: Any) -> tuple[str, torch.dtype, int]:
    """Key, type and number of values of a reference ("storage", kind, key, device, count, ...)."""
    told = note.arguments if isinstance(note, Placeholder) and note.name == STORAGE else None
    if not told or len(told) < 5 or told[0] != "storage" or not isinstance(told[1], Placeholder) or any(told[5:]):
        raise Refused(f"a tensor of {words(note)} instead of stored values")
    kind, key, count = told[1].name, told[2], told[4]
    short = kind.removeprefix("torch.").removeprefix("cuda.").removesuffix("Storage")
    dtype = NUMBERS.get(short) if kind.startswith("torch.") and kind.endswith("Storage") else None
    if dtype is None or not isinstance(key, str) or type(count) is not int or count < 0:
        raise Refused(f"stored values of the unknown kind {shown(told[1])}")
    return key, dtype, count


def _numpy_type(note: Any) -> tuple[torch.dtype, bool]:
    """The type of an array's numbers, and whether their first byte comes first."""
    arguments = note.arguments if isinstance(note, Placeholder) and note.name == "numpy.dtype" else None
    dtype = ARRAYS.get(arguments[0]) if arguments and isinstance(arguments[0], str) else None
    if dtype is None:
        raise Refused(f"an array of {words(arguments[0]) if arguments else 'no numbers'}")
    return dtype, isinstance(note.state, tuple) and note.state[1:2] == (">",)


def _sizes(value: Any) -> tuple[int, ...]:
    """Sizes or strides."""
    if isinstance(value, Placeholder) and value.name == "torch.Size" and value.arguments:
        value = value.arguments[0]
    if not isinstance(value, tuple) or not all(type(n) is int and n >= 0 for n in value):
        raise Refused("a tensor of something other than stored values and whole numbers")
    if len(value) > 64:
        raise Refused(f"a tensor of {len(value)} dimensions")
    return value


def _require_inert(arguments: tuple[Any, ...]) -> None:
    """Reject requires_grad, hooks and metadata: a file of weights has none."""
    for argument in arguments:
        if argument is not None and not isinstance(argument, bool) and as_dict(argument) != {}:
            raise Refused(f"a tensor with {words(argument)} among its arguments")


# ---- content beside the weights --------------------------------------------------------------------------------------


def words(note: Any) -> str:
    """The description of something that should have been a tensor."""
    if not isinstance(note, Placeholder) or note.arguments is None or note.name == TUPLE:
        return shown(note)
    return f"a call of what {shown(note.arguments[0])} returns" if note.name == RESULT else f"a call of {shown(note)}"


@dataclass
class Plain:
    """Converts notes to numbers, text, lists and dicts, of bounded size however often they refer to each other."""

    values: Values
    left: int = MOST
    """Number of values that can still be kept."""
    above: list[int] = field(default_factory=list)
    """The ids of the notes being converted; a note may contain itself."""

    def of(self, note: Any) -> Any:
        self.left -= 1
        if note is None or isinstance(note, bool | int | float):
            return note
        if isinstance(note, str):
            self.left -= len(note) // SMALL
            return note[: SMALL * MOST] if self.left > 0 else "..."
        if isinstance(note, bytes | Span):
            return note.decode("latin-1") if isinstance(note, bytes) and len(note) <= SMALL else "bytes"
        if self.left < 0 or id(note) in self.above:
            return "..."
        if len(self.above) > DEEPEST:
            raise Refused(f"has lists or dicts nested more than {DEEPEST} deep")
        self.above.append(id(note))
        plain = self.object(note) if isinstance(note, Placeholder) else self.inside(note)
        self.above.pop()
        return plain

    def inside(self, note: Any) -> Any:
        """The content of a dict or a list, as far as there is room for it."""
        if isinstance(note, dict):
            entries = takewhile(lambda _: self.left > 0, note.items())
            return {self.key(key): self.of(value) for key, value in entries}
        return [self.of(value) for value in takewhile(lambda _: self.left > 0, note)]

    def key(self, key: Any) -> str:
        plain = key if isinstance(key, str) else self.of(key)
        return str(tuple(plain) if isinstance(plain, list) else plain)

    def object(self, note: Placeholder) -> Any:
        name, arguments, state = note.name, note.arguments or (), note.state
        if is_tensor(note) or name == SCALAR:
            return self.number(note)
        if note.entries or note.items or (name in CONTAINERS and not arguments):
            return self.inside(note.entries or note.items)
        if name in CONTAINERS or (len(arguments) == 1 and isinstance(arguments[0], dict)):
            return self.of(arguments[0])
        if isinstance(state, dict):
            content = next((key for key in OMEGACONF if key in state and name.startswith("omegaconf.")), None)
            return self.of(state[content]) if content else self.inside(state)
        if name.startswith("pathlib.") and all(isinstance(part, str) for part in arguments):
            return str((PureWindowsPath if "Windows" in name else PurePosixPath)(*arguments))
        if name == "datetime.datetime" and arguments:
            return self.date(arguments[0])
        told = ", ".join(str(self.of(argument))[:SMALL] for argument in arguments[:10])
        return name if note.arguments is None else f"{name}({told})"

    def number(self, note: Placeholder) -> Any:
        """A NumPy scalar, or an array or tensor if it is small."""
        try:
            if note.name == SCALAR and note.arguments and len(note.arguments) == 2:
                return self.values.array(note.arguments[1], note.arguments[0], (), False).item()
            tensor = self.values.tensor(note)
        except Refused:
            return words(note)
        kind = str(tensor.dtype).removeprefix("torch.")
        return tensor.tolist() if tensor.numel() <= SMALL else f"tensor of {kind} {tuple(tensor.shape)}"

    def date(self, note: Any) -> str:
        """A date from the ten bytes of a pickled datetime."""
        try:
            content, _, size = self.values.raw(note)
            year, *rest = struct.unpack(">H5B", content[:7]) if content and size == 10 else ()
            return "{:04}-{:02}-{:02} {:02}:{:02}:{:02}".format(year, *rest)
        except (Refused, ValueError):
            return "datetime.datetime"
