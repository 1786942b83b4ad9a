"""A result: the figures, and the rule, data and weights that they belong to. One record, one JSON file.

Every writer makes a `Record`: evaluation itself, all fine-tuning by `fine_tuning_record`. Only `write` and `read` depend on
the file's format.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from clove_hub.data.files import Data
from clove_hub.documents import read_json, require_shallow
from clove_hub.runs import write_whole
from clove_hub.settings import build, convert

if TYPE_CHECKING:
    from clove_hub.weights import Weights

FORMAT = 2
FREE = {
    *("data.workers", "run.log_every", "run.save_every", "run.keep", "run.pictures", "run.amend", "run.timeout"),
}
"""Settings of a fine-tuning that change how it is carried out, not what it computes."""
CHANGED = "changed"
"""The rule of a result that was measured with other settings than those of the protocol."""
LARGEST = sys.float_info.max
RANDOM = "random:"
"""The beginning of the name of a model with random weights, which its seed decides."""

UNITS = {"RMSE": "m", "abs-rel": "", "log10": ""}
"""Of the metrics that are not in percent."""

Items = dict[str, dict[str, dict[str, float]]]
"""Figures of single classes, objects or images, by kind, name and figure: `{"class": {"sky": {"IoU": 91.2}}}`."""


@dataclass(frozen=True)
class Outcome:
    """The result of a protocol: fields of its `Record`."""

    metrics: dict[str, float]
    """In percent except for those in UNITS, with the field's usual names."""
    data: Data
    seeds: tuple[int, ...]
    deviations: dict[str, float] = field(default_factory=dict)
    """Of the metrics over the seeds: the sample standard deviation; empty for one seed."""
    split: str = ""
    """Of the data: `val`, `test2007`; empty where the data have none."""
    items: Items = field(default_factory=dict)
    """Figures of single classes, objects or images, with the count of what they are an average over."""
    absent: tuple[str, ...] = ()
    """Classes that the data declare and that never occurred in the truth."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Images that could not be read, and why."""
    chosen: dict[str, Any] = field(default_factory=dict)
    """Values that the protocol chose for settings that were null; the record has them in `settings`."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A result with everything that identifies it.

    Fields that can be None are unknown in a record of format 1.
    """

    protocol: str
    version: int
    """Of the protocol; it goes up when the same settings no longer give the same figures."""
    rule: str | None = None
    """Whose rule the protocol followed: `vissl`; `own` for one that is stated on the protocol's page alone."""
    split: str | None = None
    model: str
    """The source as given, for people to read; not an identifier."""
    architecture: str | None = None
    """As timm names it."""
    weights: str | None = None
    """The fingerprint (`clove_hub.weights.fingerprint`) of the weights that were evaluated; after fine-tuning, of those
    that it started from."""
    metrics: dict[str, float]
    deviations: dict[str, float]
    """Sample standard deviations of the metrics over the seeds; empty for one seed."""
    seeds: tuple[int, ...]
    randomness: str | None = None
    """What the seeds determine: `the probe`, `fine-tuning`; empty if nothing."""
    random_weights: bool | None = None
    """Whether the weights are random ones, which the first seed also determines."""
    absent: tuple[str, ...] | None = None
    """Classes that the data declare and that never occurred in the truth."""
    left_out: tuple[tuple[str, str], ...] | None = None
    """Images that could not be read, and why."""
    data: Data
    settings: dict[str, Any]
    preprocessing: dict[str, Any] | None = None
    """What the protocol took of the model's own preprocessing: `mean`, `std`, and where it matters `size` and others."""
    items: dict[str, Any] | None = None
    """As `Outcome.items`."""
    seconds: float | None = None
    """Wall time of the protocol; None where it was interrupted in a way that hides it."""
    versions: dict[str, str | None]
    """Of the packages that the figures depend on."""
    date: str

    @property
    def identity(self) -> tuple[str, ...]:
        """Equal for records of one model: the weights, or for random weights, that they are random.

        A record of format 1 has only the model's name.
        """
        if self.weights is None:
            return "named", self.model
        return "random" if self.random_weights else self.weights, self.architecture or ""


def fine_tuning_record(
    source: str,
    backbone: Weights,
    scores: Mapping[int, Mapping[str, float]],
    *,
    protocol: str,
    version: int,
    rule: str,
    split: str,
    data: Data,
    settings: dict[str, Any],
    versions: dict[str, str | None],
    seconds: float | None,
    items: Items | None = None,
    absent: tuple[str, ...] = (),
    preprocessing: dict[str, Any] | None = None,
) -> Record:
    """The record of a fine-tuning, whatever the engine: means and sample standard deviations over the seeds.

    Args:
        source: the backbone as it was given.
        backbone: what the training started from.
        scores: of each seed, all with the same metrics.
        preprocessing: the backbone's mean and standard deviation if not given.

    The others are the fields of `Record`.
    """
    values = {name: [each[name] for each in scores.values()] for name in next(iter(scores.values()))}
    return Record(
        protocol=protocol,
        version=version,
        rule=rule,
        split=split,
        model=source,
        architecture=backbone.architecture,
        weights=backbone.fingerprint,
        metrics={name: statistics.fmean(each) for name, each in values.items()},
        deviations={name: statistics.stdev(each) for name, each in values.items() if len(each) > 1},
        seeds=tuple(scores),
        randomness="fine-tuning",
        random_weights=source.startswith(RANDOM),
        absent=absent,
        left_out=(),
        data=data,
        settings=settings,
        preprocessing=preprocessing or backbone.preprocessing.normalization,
        items=items or {},
        seconds=seconds,
        versions=versions,
        date=now(),
    )


def notes(record: Record, named: bool = True) -> list[str]:
    """Sentences about what the figures leave out: images that could not be read, classes that never occurred.

    Args:
        named: whether the first of the images are named; a published card says only how many there are.
    """
    found = []
    if record.left_out:
        count = len(record.left_out)
        listed = "; ".join(f"{name}: {reason}" for name, reason in record.left_out[:3])
        names = f" ({listed}{'; ...' if count > 3 else ''})" if named else ""
        found.append(f"{count} image{'s' if count != 1 else ''} left out{names}")
    if record.absent:
        listed = ", ".join(record.absent[:20]) + (", ..." if len(record.absent) > 20 else "")
        found.append(f"classes that never occurred: {listed}")
    return found


def in_digits(name: str, value: float) -> str:
    """The figure with its significant digits: two decimals for a percentage, four otherwise."""
    return f"{value:.4f}" if name in UNITS else f"{value:.2f}"


def with_unit(name: str) -> str:
    """`RMSE (m)`; percent goes without saying."""
    return f"{name} ({UNITS[name]})" if UNITS.get(name) else name


def mean_items(parts: Sequence[Items], weights: Sequence[float] | None = None) -> Items:
    """The mean of each figure over those parts that have it.

    Args:
        parts: of several seeds.
        weights: how much each part counts; the same if not given.
    """
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for part, weight in zip(parts, weights or [1.0] * len(parts), strict=True):
        for kind, names in part.items():
            for name, figures in names.items():
                for figure, value in figures.items():
                    total = sums[kind, name, figure]
                    total[0] += weight * value
                    total[1] += weight
    means: Items = {}
    for (kind, name, figure), (value, count) in sums.items():
        means.setdefault(kind, {}).setdefault(name, {})[figure] = value / count
    return means


def by_class(figures: Mapping[str, float]) -> tuple[dict[str, float], Items]:
    """`{"mIoU": 50.0, "IoU/sky": 91.2}` -> `{"mIoU": 50.0}` and `{"class": {"sky": {"IoU": 91.2}}}`."""
    items: Items = {}
    for name, value in figures.items():
        figure, slash, of = name.partition("/")
        if slash:
            items.setdefault("class", {}).setdefault(of, {})[figure] = value
    return {name: value for name, value in figures.items() if "/" not in name}, items


# ---- the file --------------------------------------------------------------------------------------------------------


def write(record: Record, path: Path) -> None:
    """Write the record atomically; create its folder if it does not exist.

    Raises:
        ValueError: a figure is not finite, or the file cannot be written.
    """
    if wrong := _not_finite(record):
        raise ValueError(f"{path} would record {', '.join(wrong)} of {record.model}, which is not a finite number")
    write_text(path, json.dumps(plain(record), indent=2, ensure_ascii=False) + "\n")


def plain(record: Record) -> dict[str, Any]:
    """The record as JSON holds it."""
    return {"format": FORMAT, **dataclasses.asdict(record)}


def read(path: Path) -> Record:
    """Read a record written by `write`, also in format 1.

    Raises:
        ValueError: the file cannot be read, or is not such a record.
    """
    return from_plain(read_json(path), str(path))


def from_plain(found: Any, where: str) -> Record:
    """A record from what `plain` gives.

    Args:
        where: the file, for messages.

    Raises:
        ValueError: it is none.
    """
    require_shallow(found, where)
    fields = dataclasses.fields(Record)
    known = found.get("format") if isinstance(found, Mapping) else None
    keys = [field.name for field in fields if known != 1 or field.default is dataclasses.MISSING]
    if known not in (1, FORMAT) or found.keys() != {"format", *keys}:
        raise ValueError(
            f"{where} is not a result of format {FORMAT}, an object with {', '.join(field.name for field in fields)}: "
            "use the version of clove-hub that wrote it"
        )
    hints = get_type_hints(Record)
    values = {key: convert(found[key], hints[key], f"{where}: {key}") for key in keys if key != "data"}
    if not isinstance(found["data"], Mapping):
        raise ValueError(f"{where}: data={found['data']!r}: expected an object with name, fingerprint and samples")
    record = Record(**values, data=build(Data, found["data"], f"{where}: data"))
    if wrong := _not_finite(record):
        raise ValueError(f"{where}: {', '.join(wrong)} is not a finite number: evaluate again")
    if not record.metrics or record.data.samples < 1 or not record.deviations.keys() <= record.metrics.keys():
        raise ValueError(
            f"{where} has {len(record.metrics)} figures over {record.data.samples} samples, with deviations of "
            f"{', '.join(record.deviations) or 'none'}; expected at least one of each, and deviations only of its figures: "
            "evaluate again"
        )
    return record


def _not_finite(record: Record) -> list[str]:
    """Names of the figures that are no finite numbers, or are not where figures are."""

    def wrong(name: str, value: Any, depth: int) -> Iterator[str]:
        if depth and isinstance(value, Mapping):
            for key, inner in value.items():
                yield from wrong(f"{name}/{key}" if name else str(key), inner, depth - 1)
        elif depth or isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
            yield name

    figures = ((record.metrics, 1), (record.deviations, 1), (record.items or {}, 3))  # by kind, name and figure
    return list(dict.fromkeys(name for part, depth in figures for name in wrong("", part, depth)))


def check_writable(path: Path) -> None:
    """Raise ValueError if `write` could not write the file; create its folder. To be called before long work."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file, such as {path / 'result.json'}")
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: no permission; give another file")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically; create its folder.

    Raises:
        ValueError: it cannot be written.
    """
    check_writable(path)
    with _told(path):
        if path.exists() and not path.is_file():  # /dev/stdout, a pipe
            path.write_text(text, encoding="utf-8")
            return
        write_whole(path, text)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}; give another file") from error


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions(*engine: str) -> dict[str, str | None]:
    """Of what the figures depend on; None for what is not installed.

    Args:
        engine: packages that this result depends on besides those of every result.
    """

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("clove-hub", "torch", "timm", "numpy", "pillow", "scikit-learn", *engine)
    return {"python": platform.python_version()} | {name: installed(name) for name in packages}
