"""Numbers as exporters write them: 96.0, "96" or 96 for 96."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any


def number(value: Any) -> float | None:
    """A finite number, or text that is one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        result = float(value)
    except (ValueError, OverflowError):
        return None
    return result if math.isfinite(result) else None


def whole(value: Any) -> int | None:
    """A whole number, also as a float (96.0) or text ("96"); None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    result = number(value)
    return int(result) if result is not None and result.is_integer() else None


def label(value: Any) -> str:
    """A name: text without the blanks around it, or a whole number as text; empty for anything else."""
    return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""


def numbers(values: Any) -> list[float] | None:
    """All of a list's values as finite numbers; None if it is no list or one of them is none."""
    if not isinstance(values, list):
        return None
    if {float, int}.issuperset(map(type, values)):  # nearly always, and there are millions of them
        with suppress(OverflowError):  # an integer that no float holds
            if math.isfinite(sum(values)):
                return values
    found = [number(value) for value in values]
    return None if None in found else found  # type: ignore[return-value]


def some(values: Sequence[Any]) -> str:
    """The first five, and whether there are more."""
    return ", ".join(str(value)[:80] for value in values[:5]) + (", ..." if len(values) > 5 else "")
