"""Typed settings: frozen dataclasses, in sections, from plain data and `section.key=value`.

Recipes, fine-tuning and evaluation protocols all read their settings with it. The notes under the fields are their
documentation, which `--help` prints.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import logging
import math
import os
import textwrap
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from .documents import Word, read_document, resolved

log = logging.getLogger(__name__)

PathText = Annotated[str, "path"]
"""A field of text that names a file or folder: `~` at its beginning is expanded."""
RENAMED = {"colour": "color", "grey": "gray", "centre": "center", "neighbour": "neighbor"}
"""Parts of keys as version 0.1 spelled them, and as they are spelled now. Recipes of 0.1 stay accepted."""
MONTH = 31 * 24 * 60
"""In minutes."""
SHOWN = 200
"""Characters of a value in a message."""


class Given(str):
    """The text after `key=` on a command line: taken literally for a text field, as YAML otherwise."""

    __slots__ = ()


def read_override(override: str, lists: Collection[str] = ()) -> tuple[str, str, Given]:
    """`section.key=value` -> section, key, and the value as it was given.

    Args:
        lists: those that are no sections but lists, given whole; their key is empty.

    Raises:
        ValueError: it is not of this form.
    """
    target, equals, value = override.partition("=")
    section, dot, key = target.partition(".")
    if not equals or bool(dot) == (section in lists):
        instead = "".join(f", or {name}=[...]" for name in lists)
        raise ValueError(
            f"the override {shown(override)} is not of the form section.key=value, as in batch.total=512{instead}"
        )
    return section, key, Given(value)


def read_overrides(overrides: Iterable[str], sections: Sequence[str]) -> dict[str, dict[str, Any]]:
    """All `section.key=value`, by section and key; of a key that is given twice the last counts.

    Raises:
        ValueError: one is not of this form, or of another section.
    """
    changes: dict[str, dict[str, Any]] = {}
    for override in overrides:
        section, key, value = read_override(override)
        if section not in sections:
            raise ValueError(
                f"unknown section {section!r} in {override!r}{nearest(section, sections)}; there are {', '.join(sections)}"
            )
        changes.setdefault(section, {})[key] = value
    return changes


def build(cls: type, values: Mapping[str, Any], section: str, within: str = "") -> Any:
    """A settings dataclass from a mapping, each value checked against the field's type.

    Args:
        section: its name in messages, before the keys.
        within: what the list of known keys depends on, for the message that gives it, as in `for detection, `.

    Raises:
        ValueError: a key is unknown or lacking, a value is of another type or outside what it can be.
    """
    hints = get_type_hints(cls, include_extras=True)
    fields = dataclasses.fields(cls)
    names = [field.name for field in fields]
    values = renamed(values, names, section)
    for field in fields:
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{section}.{field.name} is not set: give it, as in {section}.{field.name}=...")
    for key in values:
        if key not in names:
            raise ValueError(
                f"unknown key {section}.{key}{nearest(str(key), names)}; "
                f"{within}{section} has {', '.join(names) or 'none'}"
            )
    return cls(**{key: convert(value, hints[key], f"{section}.{key}") for key, value in values.items()})


def renamed(values: Mapping[str, Any], names: Collection[str], section: str) -> dict[str, Any]:
    """The values with the key names of version 0.1 replaced by the present ones, each with a warning.

    Args:
        names: the present ones.
        section: their name in messages, before the keys.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        new = current(str(key))
        if key not in names and new in names:
            log.warning("%s.%s is now %s.%s: the old name is accepted until version 0.3", section, key, section, new)
            key = new
        found[key] = value
    return found


def current(key: str) -> str:
    """The present name of a key of version 0.1."""
    for old, new in RENAMED.items():
        key = key.replace(old, new)
    return key


def convert(value: Any, kind: Any, name: str, or_null: str = "") -> Any:
    """Convert a value to the type of a field.

    Text is taken as written, not as YAML would read it. A single value may stand for a tuple of any length.

    Args:
        name: of the field, for the message.
        or_null: ` or null` where the field may have no value, for the message.

    Raises:
        ValueError: it is of another type, or a non-finite number; the message names the field's type.
    """
    if isinstance(value, Given):
        as_text = takes_text(kind) and not (takes_list(kind) and value.lstrip().startswith("["))
        value = Word(value) if as_text else read_document(value, f"{name}={shown(value)}")
    origin, inner = get_origin(kind), get_args(kind)
    listed = isinstance(value, list | tuple)
    if origin is Annotated:
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        return os.path.expanduser(convert(text, str, name, or_null))
    if origin is Literal:
        found = str(value) if isinstance(value, str) and value in inner else resolved(value)
        if found not in inner:
            raise ValueError(f"{name}={shown(found)}: choose one of {', '.join(map(str, inner))}{or_null}")
        return found
    # X | None; X | Literal[word]; X | tuple[X, ...], which a list chooses the tuple of
    if origin in (Union, types.UnionType):
        if type(None) in inner and resolved(value) is None:
            return None
        words = [word for k in inner if chooses(k) for word in get_args(k)]
        if isinstance(value, str) and value in words:
            return str(value)
        choices = sorted((k for k in inner if k is not type(None)), key=chooses)
        chosen = next((k for k in choices if (get_origin(k) is tuple) == listed), choices[0])
        others = [] if chooses(chosen) else words
        return convert(
            value, chosen, name, "".join(f" or {one}" for one in [*others, *["null"] * (type(None) in inner)])
        )
    if origin is tuple:
        if inner[-1] is Ellipsis:
            if not listed:
                return (convert(value, inner[0], name),)
            inner = (inner[0],) * len(value)
        if listed and len(inner) == len(value):
            return tuple(convert(v, k, f"{name}[{i}]") for i, (v, k) in enumerate(zip(value, inner, strict=True)))
    elif kind is str and isinstance(value, str):
        return str(value)
    plain_value = resolved(value)
    if kind is Any or (origin is dict and isinstance(value, Mapping)):
        return plain_value
    if kind is float and not isinstance(plain_value, bool):
        try:
            number: float | None = float(plain_value)  # a string too: YAML reads 1e-5 as one
        except OverflowError:
            number = math.inf
        except (TypeError, ValueError):
            number = None
        if number is not None:
            if not math.isfinite(number):
                raise ValueError(f"{name}={shown(plain_value)}: must be a finite number{or_null}")
            return number
    elif type(plain_value) is kind:
        return plain_value
    expected = kind.__name__ if isinstance(kind, type) and origin is None else str(kind)
    raise ValueError(f"{name}={shown(plain_value)} is a {type(plain_value).__name__}, expected {expected}{or_null}")


def chooses(kind: Any) -> bool:
    """Whether it is one of some words."""
    origin: Any = get_origin(kind)
    return origin is Literal


def takes_text(kind: Any) -> bool:
    """Whether text, or a list of texts, is among what a field takes."""
    if get_origin(kind) is Annotated:
        return True
    return kind is str or (get_origin(kind) is not dict and any(takes_text(inner) for inner in get_args(kind)))


def takes_list(kind: Any) -> bool:
    """Whether a list is among what a field takes."""
    return get_origin(kind) is tuple or any(get_origin(inner) is tuple for inner in get_args(kind))


def settle(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Plain data for a settings dataclass that is built later: its fields of text as they were written."""
    hints = get_type_hints(cls)
    written = {key for key, value in values.items() if takes_text(hints.get(key)) and isinstance(value, str)}
    return {k: convert(v, hints[k], k) if k in written else resolved(v) for k, v in values.items()}


def shown(value: Any) -> str:
    """A value in a message, truncated if it is long."""
    return _truncated(repr(value))


def as_typed(value: Any) -> str:
    """A value of a setting as one types it: `null`, `true`, `[[9, 10]]`, a text without quotes."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _truncated(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def plain(settings: Any) -> dict[str, Any]:
    """A settings dataclass as YAML and JSON hold it, every default written out: equal to what is read back."""
    return _plain(dataclasses.asdict(settings))  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def flat(sections: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections as one level: `section.key` for what is in a section, the name alone for what is in none."""
    found: dict[str, Any] = {}
    for name, value in sections.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str]) -> list[str]:
    """The differences that make two sets of sections different runs: `section.key: old -> new`.

    Args:
        free: the `section.key` that change how a run is carried out, not what it computes.
    """
    before, after = ({current(key): value for key, value in flat(sections).items()} for sections in (old, new))
    return [
        f"{key}: {_truncated(as_typed(before.get(key)))} -> {_truncated(as_typed(after.get(key)))}"
        for key in sorted(before.keys() | after.keys())
        if key not in free and before.get(key) != after.get(key)
    ]


def fill(settings: Any, defaults: Mapping[str, Any]) -> None:
    """Replace nulls by defaults that follow from another setting; for `__post_init__` of a frozen dataclass."""
    for key, value in defaults.items():
        if getattr(settings, key) is None:
            object.__setattr__(settings, key, value)


def require_at_least(least: int, settings: Any, section: str, *keys: str) -> None:
    """Raises ValueError naming the first of these keys whose value is below `least`; null and words are below nothing."""
    for key in keys:
        if isinstance(value := getattr(settings, key), int | float) and value < least:
            bound = f"be at least {least}" if least else "not be negative"
            raise ValueError(f"{section}.{key}={value}: must {bound}")


def require_minutes(settings: Any) -> None:
    """Raises ValueError where `run.timeout` is no time that a process can wait."""
    if not 0 < settings.timeout <= MONTH:
        raise ValueError(f"run.timeout={settings.timeout:g}: must be above 0 and at most {MONTH} minutes, a month")


def nearest(word: str, words: Sequence[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no word is near."""
    near = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


# ---- help ------------------------------------------------------------------------------------------------------------


def described(cls: type, section: str = "", values: Mapping[str, Any] | None = None) -> str:
    """Every field of a settings dataclass for `--help`: `section.key=value`, its type, and the note under it.

    Args:
        values: shown instead of the defaults.
    """
    hints, said = get_type_hints(cls, include_extras=True), dict(notes(cls))
    lines = []
    for field in dataclasses.fields(cls):
        name = f"{section}.{field.name}" if section else field.name
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = (values or {}).get(field.name, default)
        if value is dataclasses.MISSING:
            lines.append(f"  {name}=...  ({kind_in_words(hints[field.name])}; required)")
        else:
            lines.append(f"  {name}={as_typed(value) or '...'}  ({kind_in_words(hints[field.name])})")
        if field.name in said:
            lines.append(" " * 6 + said[field.name])
    return "\n".join(lines)


def notes(cls: type) -> Iterator[tuple[str, str]]:
    """Each field's name with the note under it: a string in the class that follows the field."""
    for one in reversed(cls.__mro__):
        if dataclasses.is_dataclass(one):
            tree = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0]
            assert isinstance(tree, ast.ClassDef)
            for statement, following in itertools.pairwise(tree.body):
                match statement, following:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(note))):
                        yield name, " ".join(note.split())


def kind_in_words(kind: Any) -> str:
    """`tuple[float, float] | None` -> `[float, float] or null`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return str(inner[1])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if one is type(None) else kind_in_words(one) for one in inner)
    if origin is tuple:
        return f"[{', '.join('...' if one is Ellipsis else kind_in_words(one) for one in inner)}]"
    return "{key: value}" if origin is dict else {str: "text"}.get(kind, getattr(kind, "__name__", str(kind)))
