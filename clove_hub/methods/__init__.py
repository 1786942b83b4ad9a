"""The registry of pre-training methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from .base import Method
from .clove import Clove, CloveSettings
from .pixpro import Pixpro, PixproSettings


class Entry(NamedTuple):
    """How to build a method, the dataclass of its settings and the module made of a backbone and those; what it is."""

    settings: type[Any]
    build: Callable[[nn.Module, Any], nn.Module]
    summary: str
    """In one line, for lists."""


METHODS: dict[str, Entry] = {
    "clove": Entry(
        CloveSettings, Clove, "cells that see their context agree with the same place in other crops, hard negatives"
    ),
    "pixpro": Entry(
        PixproSettings, Pixpro, "cells smoothed by those they resemble agree with the same place, no negatives"
    ),
}

__all__ = ["METHODS", "Clove", "CloveSettings", "Entry", "Method", "Pixpro", "PixproSettings"]
