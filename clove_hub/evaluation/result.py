"""What an evaluation leaves: one record, one JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from clove_hub.data.files import Data

FORMAT = 1
FREE = {"data.workers", "run.log_every", "run.save_every", "run.keep", "run.pictures"}
"""Settings of a fine-tuning that change how it is carried out, not what it computes."""


@dataclass(frozen=True)
class Outcome:
    """What a protocol has found."""

    metrics: dict[str, float]
    """In percent where the field uses percent, named as the field does."""
    data: Data
    seeds: tuple[int, ...]
    deviations: dict[str, float] = field(default_factory=dict)
    """Of the metrics over the seeds: the sample standard deviation; empty for one seed."""
    split: str = ""
    """Of the data: `val`, `test2007`; empty where the data have none."""
    items: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metrics of single classes, clips or images: `{"class": {"sky": 91.2}}`, by kind and name."""
    absent: tuple[str, ...] = ()
    """Classes that the data declare and that never occurred in the truth."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Images that could not be read, and why."""


@dataclass(frozen=True)
class Record:
    """A result with all that is needed to know what it is a result of."""

    protocol: str
    version: int
    model: str
    metrics: dict[str, float]
    settings: dict[str, Any]
    data: Data
    seeds: tuple[int, ...]
    deviations: dict[str, float]
    versions: dict[str, str | None]
    date: str


def write(record: Record, path: Path) -> None:
    """Writes the record; a folder that does not exist yet is made.

    Raises:
        ValueError: a metric is not finite, or the file cannot be written.
    """
    if wrong := [name for name, value in record.metrics.items() if not math.isfinite(value)]:
        raise ValueError(f"{path} would record {', '.join(wrong)} of {record.model}, which is not a finite number")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT} | dataclasses.asdict(record), indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}; give another file") from error


def read(path: Path) -> Record:
    """Reads what `write` has written.

    Raises:
        ValueError: the file cannot be read, or is not such a record.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a result: {error}") from error
    keys = [field.name for field in dataclasses.fields(Record)]
    if not isinstance(found, Mapping) or found.get("format") != FORMAT or found.keys() != {"format", *keys}:
        raise ValueError(
            f"{path} is not a result of format {FORMAT}, an object with {', '.join(keys)}: "
            "use the version of clove-hub that wrote it"
        )
    try:
        values = {key: found[key] for key in keys} | {"data": Data(**found["data"]), "seeds": tuple(found["seeds"])}
    except TypeError as error:
        raise ValueError(f"{path} has data or seeds that are not a result's: {error}") from error
    return Record(**values)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str | None]:
    """Of what the figures depend on; None for what is not installed."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("clove-hub", "torch", "timm", "numpy", "pillow", "scikit-learn")
    return {"python": platform.python_version()} | {name: installed(name) for name in packages}
