"""The registry of pre-training methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from .base import Method
from .clove import Clove, CloveSettings


class Entry(NamedTuple):
    """How to build a method: the dataclass of its settings, and the module made of a backbone and those."""

    settings: type[Any]
    build: Callable[[nn.Module, Any], nn.Module]


METHODS: dict[str, Entry] = {
    "clove": Entry(CloveSettings, Clove),
}

__all__ = ["METHODS", "Clove", "CloveSettings", "Entry", "Method"]
