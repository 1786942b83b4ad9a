"""What a PyTorch checkpoint's pickle would do, found out by reading it and without doing any of it.

A pickle is a program for a small machine. This is that machine with nothing attached to it: where the program asks for
a function, the name of the function is put on the stack; where it calls one, a note of the call is. So a file can be
refused before anything of it runs or takes up memory, and the refusal can name what was found. Only then does torch
read it, by a list of its own of what it lets through (`weights_only=True`).

Only the instructions that `torch.save` writes are known here (pickle protocol 2), and a few more of later protocols, so
that what those ask for can be named too.
"""

from __future__ import annotations

import io
import math
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAGIC = 0x1950A86A20F9469CFC6C
"""With this number begins what torch saved before 1.6, as a row of five pickles and the tensors' values."""
LARGEST = 16 << 20
"""Bytes of a pickle. That of a ResNet-50's whole training state has some hundred thousand; values are not in it."""
LONGEST = 300_000
"""Instructions of a pickle; that state has some thirty thousand."""
DEEPEST = 100
"""Lists, tuples and dicts within each other."""

ITEM_SIZES = {
    kind: size
    for size, kinds in {8: "Double Long", 4: "Float Int", 2: "Half BFloat16 Short", 1: "Char Byte Bool"}.items()
    for kind in kinds.split()
}
"""Bytes of a number in each kind of storage that weights are kept in."""
CALLED = {
    "collections.OrderedDict",
    "argparse.Namespace",
    "torch.Size",
    "torch.device",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
}
"""All that a checkpoint may call: what tensors and plain data are made with."""
UNLIKE_WEIGHTS = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values (of the meta device)",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a special kind",
    "torch._tensor._rebuild_from_type_v2": "a tensor of a special kind",
    **{f"torch.{kind}Storage": "complex numbers" for kind in ("ComplexFloat", "ComplexDouble")},
    **{f"torch.{kind}Storage": "quantized numbers" for kind in ("QInt8", "QInt32", "QUInt8", "QUInt4x2", "QUInt2x4")},
}
"""What torch knows, and weights are not made of."""


class Refused(Exception):
    """What a pickle holds that no file of weights needs, in words that follow `it`."""


@dataclass(frozen=True)
class Name:
    """A function or class that was asked for, by its full name."""

    full: str


@dataclass
class Call:
    """One that would have been called, with what."""

    name: str
    arguments: tuple[Any, ...]
    entries: dict[Any, Any] = field(default_factory=dict)
    """Of an OrderedDict."""


@dataclass(frozen=True)
class Storage:
    """The values that tensors look into: `count` numbers of one kind, `item` bytes each, kept in the file under `key`."""

    key: str
    kind: str
    count: int
    item: int


class _Mark:
    pass


_MARK = _Mark()


def check_pickle(content: bytes, records: Mapping[str, int] | None, room: int) -> None:
    """Holds a checkpoint's pickle to what `torch.save` writes of tensors and plain data.

    Args:
        content: the pickle; for a file from before torch 1.6, the whole beginning of the file.
        records: bytes of each storage in the archive, by its key; None for a file from before torch 1.6.
        room: bytes that the whole file has.

    Raises:
        Refused: it asks for anything else, is no pickle, or tells of more values than the file can hold.
    """
    stream = io.BytesIO(content[:LARGEST])
    machine = _Machine(records, room)
    if records is not None:
        machine.run(stream)
    else:
        if machine.run(stream) != MAGIC:
            raise Refused("is a plain pickle, not what torch.save writes")
        for _ in range(4):  # a version, the byte order, the content, the order of the storages
            machine.run(stream)
    machine.check_sizes()


class _Machine:
    """Runs pickles on names instead of things."""

    def __init__(self, records: Mapping[str, int] | None, room: int) -> None:
        self.records = records
        self.room = room
        self.storages: dict[str, Storage] = {}
        self.claimed = 0
        self.steps = 0
        self.copied = 0
        self.depths: dict[int, tuple[int, Any]] = {}
        """Of what holds other things, by its id; it is kept, so that its id stays its own."""

    def run(self, stream: io.BytesIO) -> Any:
        """One pickle: what it leaves, as notes."""
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        try:
            for code, argument, _ in pickletools.genops(stream):
                self.steps += 1
                if self.steps > LONGEST:
                    raise Refused(f"has more than {LONGEST:,} instructions, where a checkpoint has some ten thousand")
                if code.name == "STOP":
                    return stack.pop()
                self.step(code.name, argument, stack, memo)
        except Refused:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeError, OverflowError) as error:
            if stream.tell() >= LARGEST:
                raise Refused(f"has a pickle of more than {LARGEST >> 20} MiB, where values are kept apart") from error
            reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
            raise Refused(
                f"is cut short or damaged: its pickle ends in the middle or makes no sense ({reason})"
            ) from error
        raise AssertionError("pickletools ends with STOP or an error")

    def step(self, code: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
        """One instruction."""
        if code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in _LITERALS:
            stack.append(argument)
        elif code == "EMPTY_LIST":
            stack.append([])
        elif code == "EMPTY_DICT":
            stack.append({})
        elif code == "MARK":
            stack.append(_MARK)
        elif code in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif code == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif code in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(code[-1])
            stack[-count:] = [self.holding(tuple(stack[-count:]), stack[-count:])]
        elif code == "TUPLE":
            items = _to_mark(stack)
            stack.append(self.holding(tuple(items), items))
        elif code in ("APPEND", "APPENDS"):
            items = [stack.pop()] if code == "APPEND" else _to_mark(stack)
            self.holding(stack[-1], items).extend(items)
        elif code in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if code == "SETITEM" else _to_mark(stack)
            self.set(self.holding(stack[-1], items), items)
        elif code == "GLOBAL":
            stack.append(_known(*argument.split(" ", 1)))
        elif code == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            if not (isinstance(name, str) and isinstance(module, str)):
                raise Refused("asks for something whose name is no text")
            stack.append(_known(module, name))
        elif code == "INST":
            _known(*argument.split(" ", 1))
            raise Refused("makes an object in a way that torch.save does not (INST)")
        elif code in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            stack.append(self.call(called, arguments))
        elif code == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], Call):
                raise Refused("gives attributes to what is no object")
            self.copy([state])
        elif code == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        elif code not in ("PROTO", "FRAME"):
            raise Refused(f"uses the pickle instruction {code}, which torch.save does not write")

    def call(self, called: Any, arguments: Any) -> Any:
        """A note of the call; a call of a function that makes tensors must fit its storage."""
        if not isinstance(called, Name) or called.full not in CALLED or not isinstance(arguments, tuple):
            raise Refused(f"calls {_shown(called)}, which no file of weights needs")
        self.copy(arguments)
        if called.full.startswith("torch._utils._rebuild_tensor"):
            self.tensor(arguments)
        return self.holding(Call(called.full, arguments), arguments)

    def holding(self, holder: Any, items: Sequence[Any]) -> Any:
        """`holder`, which these things go into; whatever walks through it later must not get too deep."""
        inner = max((self.depths.get(id(item), (0, None))[0] for item in items), default=0)
        if inner >= DEEPEST:
            raise Refused(f"has lists or dicts within each other, more than {DEEPEST} deep")
        self.depths[id(holder)] = max(self.depths.get(id(holder), (0, None))[0], inner + 1), holder
        return holder

    def copy(self, arguments: Any) -> None:
        """A thing that is named often but written once could unfold to any size; what torch writes is used once."""
        self.copied += sum(len(a) for a in arguments if isinstance(a, (list, tuple, dict)))
        if self.copied > LONGEST:
            raise Refused(f"copies more than {LONGEST:,} entries, far more than it has instructions for")

    def set(self, target: Any, items: list[Any]) -> None:
        """Entries of a dict, none of them twice."""
        if isinstance(target, Call) and target.name == "collections.OrderedDict":
            target = target.entries
        if not isinstance(target, dict) or len(items) % 2:
            raise Refused("sets entries of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int, float, bytes, type(None))):
                raise Refused(f"has a dict with the key {_shown(key)}, which is no name")
            if key in target:
                raise Refused(f"names {_shown(key)} twice")
            target[key] = value

    def storage(self, told: Any) -> Storage:
        """What a tensor's values are told to be: ("storage", kind, key, device, count)."""
        if not (isinstance(told, tuple) and len(told) >= 5 and told[0] == "storage" and isinstance(told[1], Name)):
            raise Refused("refers to something else than stored values")
        kind, key, count = told[1].full, told[2], told[4]
        item = ITEM_SIZES.get(kind.removeprefix("torch.cuda.").removeprefix("torch.").removesuffix("Storage"))
        if item is None or not isinstance(key, str) or not isinstance(count, int) or count < 0:
            raise Refused(f"refers to stored values of the kind {_shown(told[1])}, which are not known here")
        storage = Storage(key, kind, count, item)
        if self.records is not None and self.records.get(key) != count * item:
            held = f"{self.records[key]:,}" if key in self.records else "none"
            raise Refused(f"tells of a storage {_shown(key)} of {count * item:,} bytes, and the archive holds {held}")
        if self.storages.setdefault(key, storage) != storage:
            raise Refused(f"tells of the storage {_shown(key)} in two ways")
        return storage

    def tensor(self, arguments: tuple[Any, ...]) -> None:
        """A tensor: (storage, offset, size, stride, ...). It may not have more values than its storage."""
        storage, offset, size, stride = arguments[:4] if len(arguments) >= 4 else (None,) * 4
        size, stride = _tuple(size), _tuple(stride)
        if len(size) > 64 or len(size) != len(stride):
            raise Refused(f"has a tensor of {len(size)} dimensions and {len(stride)} strides")
        if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in (*size, *stride, offset)):
            raise Refused("makes a tensor of something else than stored values and whole numbers")
        count = math.prod(size)
        reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if count else 0
        if max(count, reach) > storage.count:
            raise Refused(
                f"has a tensor {_shown(str(size))} of {count:,} values up to place {reach:,} of a storage that has "
                f"{storage.count:,}"
            )
        self.claimed += count * storage.item

    def check_sizes(self) -> None:
        """All storages together fit into the file, and its tensors do not show the same values over and over."""
        if (held := sum(storage.count * storage.item for storage in self.storages.values())) > self.room:
            raise Refused(f"tells of {held:,} bytes of values, and the file has {self.room:,}")
        if self.claimed > 4 * self.room:  # shared weights show twice
            raise Refused(f"has tensors of {self.claimed:,} bytes together, and the file has {self.room:,}")


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
    *("SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES"),
}


def _to_mark(stack: list[Any]) -> list[Any]:
    """Takes what lies above the last mark off the stack, and the mark."""
    items = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _known(module: str, name: str) -> Name:
    """The name as Python 3 has it (protocol 2 writes those of Python 2), if a file of weights may ask for it."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    full = f"{module}.{name}"
    if full in UNLIKE_WEIGHTS:
        raise Refused(f"holds {UNLIKE_WEIGHTS[full]} ({full})")
    kind = full.removeprefix("torch.cuda.").removeprefix("torch.")
    is_dtype = full.startswith("torch.") and kind in _DTYPES
    if full in CALLED or is_dtype or (full.startswith("torch.") and kind.removesuffix("Storage") in ITEM_SIZES):
        return Name(full)
    raise Refused(f"asks for {_shown(full)}")


_DTYPES = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}


def _tuple(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Call) and value.name == "torch.Size" and value.arguments:
        value = value.arguments[0]
    return value if isinstance(value, tuple) else (None,)


def _shown(value: Any) -> str:
    """A name as it may be printed; what it came from is not to be trusted."""
    if isinstance(value, Name):
        value = value.full
    if not isinstance(value, (str, int, float, bytes, type(None))):
        return f"a {type(value).__name__.lower()}"
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
