"""Reading YAML and JSON documents, with limits on their size.

Unquoted YAML scalars keep their text until the required type is known: `path: 2024-11-25` is a date in YAML, but the
name of a folder for a text field.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

LARGEST = 1 << 18
"""Characters of a document, of its own and with aliases followed; the recipes have 2000."""
LARGEST_OBJECT = 16 << 20
"""Bytes of a JSON file about weights or results; ours have some thousand."""
DEEPEST = 50
"""Lists and objects within each other; ours have five."""
TEXT, LIST, MAPPING = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))
UNTYPED = (TEXT, *(f"tag:yaml.org,2002:{kind}" for kind in ("timestamp", "merge", "value")))
"""What an unquoted scalar may look like to YAML and stays text here."""
POWER_OF_TEN = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class Word(str):
    """An unquoted scalar: its text, converted when its type is known."""

    __slots__ = ()


def reason(error: Exception) -> str:
    """What an error says; the system's errors without their number and the path, which the message names already."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def read_document(text: str, what: str) -> Any:
    """Dictionaries with text as keys, lists, quoted text, and unquoted scalars as `Word`.

    Args:
        what: the document, for messages.

    Raises:
        ValueError: it is no YAML, a mapping has a key twice, it is too large, or it has tags.
    """
    if len(text) > LARGEST:
        raise ValueError(f"{what} has {len(text)} characters: at most {LARGEST} are read")
    try:
        loader: Any = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return Word("")
        if (size := _size(node, what, {})) > LARGEST:
            raise ValueError(
                f"{what} has {size:.3g} characters with its aliases (*name) expanded: write it without them"
            )
        return _plain(loader, node, what)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{what} is not valid YAML{where}: {problem}") from error
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None


def resolved(value: Any) -> Any:
    """Plain data, with each `Word` in it as YAML 1.1 types it; dates stay text, and 1e-5 is a number, as in YAML 1.2."""
    if isinstance(value, dict):
        return {key: resolved(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [resolved(inner) for inner in value]
    if not isinstance(value, Word):
        return value
    if POWER_OF_TEN.fullmatch(value):
        return float(value)
    loader: Any = yaml.SafeLoader("")
    tag = loader.resolve(yaml.ScalarNode, str(value), (True, False))
    try:
        return str(value) if tag in UNTYPED else loader.construct_object(yaml.ScalarNode(tag, str(value)))
    except ValueError:  # more digits than Python makes a number of
        return str(value)


def _size(node: yaml.Node, what: str, sizes: dict[int, int]) -> int:
    """Characters and values with all aliases followed, each node visited once."""
    if id(node) not in sizes:
        sizes[id(node)] = -1
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        own = len(node.value)
        inner = 0 if isinstance(node, yaml.ScalarNode) else sum(_size(part, what, sizes) for part in parts)
        sizes[id(node)] = 1 + own + inner
    if sizes[id(node)] < 0:
        raise ValueError(f"{what} has an alias (*name) inside what it stands for: write it without the alias")
    return sizes[id(node)]


def _plain(loader: Any, node: yaml.Node, what: str) -> Any:
    where = f"{what}, line {node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode) and node.tag == LIST:
        return [_plain(loader, inner, what) for inner in node.value]
    if isinstance(node, yaml.MappingNode) and node.tag == MAPPING:
        keys: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"{where}: a key must be text")
            if key.value in keys:
                raise ValueError(
                    f"{what}, line {key.start_mark.line + 1}: the key {key.value!r} is given twice: remove one"
                )
            keys.add(key.value)
        loader.flatten_mapping(node)  # the pairs of `<<` come first
        return {key.value: _plain(loader, inner, what) for key, inner in node.value}
    if isinstance(node, yaml.ScalarNode):
        if node.style is None and node.tag == loader.resolve(yaml.ScalarNode, node.value, (True, False)):
            return Word(node.value)
        if node.tag == TEXT:
            return str(node.value)
    raise ValueError(f"{where}: the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} is not supported: leave it out")


# ---- JSON ------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        data = path.read_bytes()
        if not data.strip():
            raise ValueError("the file is empty")
        return json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path} cannot be read as JSON ({reason})") from error


def read_object(path: Path) -> dict[str, Any]:
    """The content of a small JSON file that holds an object.

    Raises:
        ValueError: it cannot be read, holds something else, is too large, or nested too deeply.
    """
    if path.is_file() and (size := path.stat().st_size) > LARGEST_OBJECT:
        raise ValueError(f"{path} has {size:,} bytes, expected at most {LARGEST_OBJECT:,}")
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__} {found!r:.40}, expected an object of keys and values")
    require_shallow(found, str(path))
    return found


def require_shallow(value: Any, what: str) -> None:
    """Raises ValueError where lists and objects lie so deep within each other that no code could walk through them."""
    level = [value]
    for _ in range(DEEPEST):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [each for values in inner for each in values]
        if not level:
            return
    raise ValueError(f"{what} has lists or objects nested more than {DEEPEST} deep")
