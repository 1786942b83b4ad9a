"""The content of a pickle, read as data.

A pickle is a program for a small virtual machine. This is that machine without side effects: a reference to a function
or class is recorded by name, and a call is recorded as a note. Nothing is imported, and nothing that a file names is
called. `stored.py` converts the notes to tensors and plain data.

It supports the instructions of all protocols, 0 to 5, by `pickletools` of the standard library.
"""

from __future__ import annotations

import mmap
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from dataclasses import dataclass, field
from typing import Any, NamedTuple

LONGEST = 1_000_000
"""Maximum instructions of a pickle. A ResNet-50's training state has about thirty thousand, a list one per number."""
IN_PLACE = 4096
"""Minimum size of bytes that are recorded by their position in the file instead of being copied."""
LARGEST_INTEGER = 8192
"""Maximum bits of an integer: hashing or printing longer ones is expensive."""
STORAGE = "a reference to stored values"
RESULT = "the result of a call"
TUPLE = "a tuple"
"""Stands for a tuple as the key of a dict."""


class Refused(Exception):
    """The fault of a file, as a phrase that follows `it`."""


@dataclass(eq=False, repr=False)
class Placeholder:
    """An object that was not created: the name of its class or function, and its arguments."""

    name: str
    """Full name: `collections.OrderedDict`."""
    arguments: tuple[Any, ...] | None = None
    """None if it was referenced but not called."""
    state: Any = None
    items: list[Any] = field(default_factory=list)
    """Items of a list or a set."""
    entries: dict[Any, Any] = field(default_factory=dict)
    """Entries of a dict."""


class Span(NamedTuple):
    """Bytes that remain in the file."""

    start: int
    size: int


def read_pickle(stream: mmap.mmap, storages: list[Placeholder]) -> Any:
    """Read the pickle at the current position of `stream`.

    Args:
        stream: a mapped file, so that no read uses more memory than the size of the file.
        storages: each reference to values outside of the pickle is appended.

    Returns:
        Plain values, lists, tuples, dicts, `Placeholder` and `Span`.

    Raises:
        Refused: it is invalid, truncated, or longer than any pickle of weights.
    """
    machine = _Machine(stream, storages)
    try:
        for steps, (code, argument, _) in enumerate(pickletools.genops(stream)):  # type: ignore[arg-type]
            if code.name == "STOP":
                return machine.stack.pop()
            if steps > LONGEST:
                raise Refused(
                    f"has a pickle of more than {LONGEST:,} instructions, where a checkpoint has about 10,000"
                )
            machine.step(code.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise Refused(f"is cut short or damaged: its pickle ends early or is not valid ({reason})") from error
    raise AssertionError("pickletools ends with STOP or an error")


class _Machine:
    def __init__(self, stream: mmap.mmap, storages: list[Placeholder]) -> None:
        self.stream = stream
        self.storages = storages
        self.stack: list[Any] = []
        """Values pushed since the last mark."""
        self.marked: list[list[Any]] = []
        """Values pushed before each mark."""
        self.memo: dict[int, Any] = {}

    def step(self, code: str, argument: Any) -> None:
        """Execute one instruction."""
        stack = self.stack
        match code:
            case "BININT" | "BININT1" | "BININT2" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINFLOAT" | "LONG1":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self.memo[argument])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.take(int(code[-1]))))
            case "REDUCE" | "NEWOBJ":
                stack.append(_call(*self.take(2)))
            case "BINPERSID":
                stack.append(self.reference(stack.pop()))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[code])
            case "MARK":
                self.marked.append(stack)
                self.stack = []
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[code]())
            case "TUPLE" | "LIST":
                items = self.take_marked()
                self.stack.append(tuple(items) if code == "TUPLE" else items)
            case "DICT":
                items = self.take_marked()
                self.stack.append({})
                self.set(items)
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = self.take(1) if code == "APPEND" else self.take_marked()
                target = self.stack[-1]
                (target.items if isinstance(target, Placeholder) else target).extend(items)
            case "SETITEM" | "SETITEMS":
                self.set(self.take(2) if code == "SETITEM" else self.take_marked())
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], Placeholder):
                    raise Refused("sets attributes on a value that is not an object")
                stack[-1].state = state
            case "GLOBAL":
                stack.append(_named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_named(*self.take(2)))
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                size = len(argument)
                stack.append(bytes(argument) if size < IN_PLACE else Span(self.stream.tell() - size, size))
            case "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "UNICODE" | "BINUNICODE8" | "INT" | "LONG" | "FLOAT":
                stack.append(argument)
            case "LONG4":
                short = argument.bit_length() <= LARGEST_INTEGER
                stack.append(argument if short else Placeholder("builtins.int", (f"{argument.bit_length()} bits",)))
            case "EMPTY_SET" | "FROZENSET":
                items = [] if code == "EMPTY_SET" else self.take_marked()
                self.stack.append(Placeholder("builtins.set", (), items=items))
            case "INST":
                items = self.take_marked()
                self.stack.append(_call(_named(*argument.split(" ", 1)), tuple(items)))
            case "OBJ":
                kind, *items = self.take_marked()
                self.stack.append(_call(kind, tuple(items)))
            case "NEWOBJ_EX":
                kind, arguments, keywords = self.take(3)
                stack.append(_call(kind, (*arguments, keywords)))
            case "PERSID":
                stack.append(self.reference(argument))
            case "EXT1" | "EXT2" | "EXT4":
                stack.append(Placeholder(f"copyreg extension {argument}"))
            case "POP":
                self.take(1) if stack else self.take_marked()
            case "POP_MARK":
                self.take_marked()
            case "DUP":
                stack.append(stack[-1])
            case "PROTO" | "FRAME":
                pass
            case _:
                raise Refused(f"uses the pickle instruction {code}, which refers to something outside the file")

    def take(self, count: int) -> list[Any]:
        """Pop the last values from the stack, in the order in which they were pushed."""
        values = self.stack[-count:]
        if len(values) < count:
            raise IndexError("nothing on the stack")
        del self.stack[-count:]
        return values

    def take_marked(self) -> list[Any]:
        """Pop the values above the last mark."""
        values, self.stack = self.stack, self.marked.pop()
        return values

    def set(self, items: list[Any]) -> None:
        """Set entries of the dict on top of the stack, rejecting duplicates."""
        target = self.stack[-1]
        target = target.entries if isinstance(target, Placeholder) else target
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, tuple) or (isinstance(key, int) and key.bit_length() > 60):
                key = Placeholder(TUPLE, (key,))  # hashed by identity, not by content, which a file could choose
            if key in target:
                raise Refused(f"names {shown(key)} twice")
            target[key] = value

    def reference(self, told: Any) -> Placeholder:
        """A reference to values outside of the pickle."""
        found = Placeholder(STORAGE, told if isinstance(told, tuple) else (told,))
        self.storages.append(found)
        return found


def _named(module: Any, name: Any) -> Placeholder:
    """A referenced object by its name in Python 3 and NumPy 2 (protocol 2 writes those of Python 2)."""
    if not (isinstance(module, str) and isinstance(name, str)):
        raise Refused("refers to something whose name is not text")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return Placeholder(f"{module.replace('numpy.core.', 'numpy._core.')}.{name}")


def _call(called: Any, arguments: Any) -> Placeholder:
    """A note of a call."""
    arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    if isinstance(called, Placeholder) and called.arguments is None:
        return Placeholder(called.name, arguments)
    return Placeholder(RESULT, (called, *arguments))


def shown(value: Any) -> str:
    """A printable form of a name from an untrusted file."""
    text = value.name if isinstance(value, Placeholder) else value if isinstance(value, str) else None
    if text is None:
        if value is not None and not isinstance(value, (int, float, bytes)):
            return f"a {type(value).__name__}"
        text = repr(value)
    text = text if text[:80].isprintable() else ascii(text[:80])
    return text if len(text) <= 80 else f"{text[:77]}..."
