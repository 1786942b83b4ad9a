"""The registry of pre-training methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from .base import Method
from .clove import Clove, CloveSettings
from .moco import Moco, MocoKnnSettings, MocoSettings
from .pixpro import Pixpro, PixproSettings
from .slotcon import SlotCon, SlotConSettings


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
    "moco": Entry(MocoSettings, Moco, "two crops of a photo agree, a queue of other photos as negatives"),
    "moco_knn": Entry(
        MocoKnnSettings, Moco, "MoCo with small overlapping crops, AutoAugment and similar photos as positives"
    ),
    "slotcon": Entry(
        SlotConSettings, SlotCon, "cells are grouped by prototypes, and the groups of two crops told apart from others"
    ),
    "pixpro": Entry(
        PixproSettings, Pixpro, "cells smoothed by those they resemble agree with the same place, no negatives"
    ),
}

__all__ = [
    "METHODS",
    "Clove",
    "CloveSettings",
    "Entry",
    "Method",
    "Moco",
    "MocoKnnSettings",
    "MocoSettings",
    "Pixpro",
    "PixproSettings",
    "SlotCon",
    "SlotConSettings",
]
