"""Typed settings: frozen dataclasses, in sections, from plain data and `section.key=value`.

Recipes, fine-tuning and the protocols of evaluation all read theirs with this.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

log = logging.getLogger(__name__)

RENAMED = {"colour": "color", "grey": "gray", "centre": "center", "neighbour": "neighbor"}
"""Parts of keys as version 0.1 spelled them, and as they are spelled now. Recipes of 0.1 stay accepted."""


def read_override(override: str, lists: Collection[str] = ()) -> tuple[str, str, Any]:
    """`section.key=value` -> section, key, and the value, read as YAML.

    Args:
        lists: those that are no sections but lists, given whole; their key is empty.

    Raises:
        ValueError: it is not of this form, or the value is not valid YAML.
    """
    target, equals, value = override.partition("=")
    section, dot, key = target.partition(".")
    if not equals or bool(dot) == (section in lists):
        instead = "".join(f", or {name}=[...]" for name in lists)
        raise ValueError(f"the override {override!r} does not read section.key=value, as in batch.total=512{instead}")
    try:
        return section, key, yaml.safe_load(value) if value else ""
    except yaml.YAMLError as error:
        raise ValueError(f"the value of the override {override!r} is not valid YAML: {error}") from error


def build(cls: type, values: Mapping[str, Any], section: str, within: str = "") -> Any:
    """A settings dataclass from a mapping, each value checked against the field's type.

    Args:
        section: its name in messages, before the keys.
        within: what the list of known keys depends on, for the message that gives it, as in `for detection, `.

    Raises:
        ValueError: a key is unknown or lacking, a value is of another type or outside what it can be.
    """
    hints = get_type_hints(cls)
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
    """The values with keys that version 0.1 spelled otherwise under their present names, each with a warning.

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
    """A key of version 0.1 as it is spelled now."""
    for old, new in RENAMED.items():
        key = key.replace(old, new)
    return key


def convert(value: Any, kind: Any, name: str, or_null: str = "") -> Any:
    """A YAML value as the type that a field asks for.

    One value alone may stand for a tuple of any length.

    Args:
        name: of the field, for the message.
        or_null: ` or null` where the field may have no value, for the message.

    Raises:
        ValueError: it is of another type; the message says which the field asks for.
    """
    origin, inner = get_origin(kind), get_args(kind)
    listed = isinstance(value, list | tuple)
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(str, inner))}{or_null}")
        return value
    if origin in (Union, types.UnionType):  # X | None; X | tuple[X, ...], which a list chooses the tuple of
        if value is None and type(None) in inner:
            return None
        choices = [k for k in inner if k is not type(None)]
        chosen = next((k for k in choices if (get_origin(k) is tuple) == listed), choices[0])
        return convert(value, chosen, name, " or null" if type(None) in inner else "")
    if origin is tuple:
        if inner[-1] is Ellipsis:
            if not listed:
                return (convert(value, inner[0], name),)
            inner = (inner[0],) * len(value)
        if listed and len(inner) == len(value):
            return tuple(convert(v, k, f"{name}[{i}]") for i, (v, k) in enumerate(zip(value, inner, strict=True)))
    elif origin is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif kind is float and not isinstance(value, bool):
        try:
            return float(value)  # a string too: YAML reads 1e-5 as one
        except (TypeError, ValueError):
            pass
    elif type(value) is kind:
        return value
    expected = kind.__name__ if isinstance(kind, type) and origin is None else str(kind)
    raise ValueError(f"{name}={value!r} is a {type(value).__name__}, expected {expected}{or_null}")


def plain(settings: Any) -> dict[str, Any]:
    """A settings dataclass as YAML and JSON can hold it, every default written out."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(settings).items()
    }


def flat(sections: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections as one level: `section.key` for what is in a section, the name alone for what is in none."""
    found: dict[str, Any] = {}
    for name, value in sections.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str]) -> list[str]:
    """What keeps two sets of sections from being the same run: `section.key: old -> new`.

    Args:
        free: the `section.key` that change how a run is carried out, not what it computes.
    """
    before, after = ({current(key): value for key, value in flat(sections).items()} for sections in (old, new))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if key not in free and before.get(key) != after.get(key)
    ]


def nearest(word: str, words: Sequence[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no word is near."""
    near = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
