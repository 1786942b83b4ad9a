"""Tables of comparable results, with a row for each model over its seeds.

A row is one model, identified by its weights' fingerprint, with one set of settings. The results of a table are
comparable: one protocol, version and rule, one split of the same data.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clove_hub.runs import read_rows
from clove_hub.settings import flat
from clove_hub.zoo.models import Protocol, models, papers, protocols

from .result import FREE, Record, from_plain, in_digits, mean_items, notes, read, with_unit

log = logging.getLogger(__name__)

NAMES = ("results.json", "result.json")
"""What must be a record. Of the other JSON files in a folder those are taken that begin as one."""
ROWS = "evaluations.jsonl"


@dataclass(frozen=True)
class Row:
    """One model under one protocol with one set of settings, over all seeds that were found."""

    record: Record
    """The newest, with the means over all seeds, their sample standard deviations (none for one seed) and all seeds."""
    settings: dict[str, Any]
    """By dotted name, with the model's preprocessing; the seed is not among them."""
    counts: dict[str, int]
    """Over how many seeds the mean of each metric is taken; fewer than all where a record lacks it."""
    files: tuple[str, ...]
    """Of the records, each once for every record in it."""


# ---- records ---------------------------------------------------------------------------------------------------------


def find(paths: Sequence[Path]) -> list[tuple[Path, Record]]:
    """The records in files, and in all that folders hold, each file once.

    Raises:
        ValueError: a path is absent, a folder holds none, or a file is no record.
    """
    files: dict[Path, Path] = {}
    for path in map(Path.expanduser, paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        found = [path]
        if path.is_dir():
            beneath = (*path.rglob("*.json"), *path.rglob(ROWS))
            found = sorted(file for file in beneath if file.is_file() and _is_result(file))
        if not found:
            raise ValueError(
                f"{path} holds no result: neither a JSON file that `clove-hub evaluate --json` or a fine-tuning has "
                f"written nor {ROWS}"
            )
        for file in found:
            files.setdefault(file.resolve(), file)
    return [(file, record) for file in files.values() for record in _records(file)]


def _is_result(file: Path) -> bool:
    """Whether it is one, or ought to be."""
    if file.name in (*NAMES, ROWS):
        return True
    with file.open("rb") as opened:
        start = opened.read(200)
    return b'"format"' in start and b'"protocol"' in start


def _records(file: Path) -> list[Record]:
    """The record of a file; of a run's evaluations, of each that was asked for, that of the newest step."""
    if file.suffix != ".jsonl":
        return [read(file)]
    newest: dict[str, Mapping[str, Any]] = {}
    try:
        for row in read_rows(file):
            asked = json.dumps(row["asked"], sort_keys=True)
            if asked not in newest or row["step"] >= newest[asked]["step"]:
                newest[asked] = row
        # Rows of format 1 have no `format`.
        found = [(row["step"], {"format": 1, **row["record"]}) for row in newest.values()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file} cannot be read as a run's evaluations ({type(error).__name__}: {error}): expected a line with step, "
            "asked and record for each"
        ) from error
    if not found:
        raise ValueError(f"{file} has no complete line")
    return [from_plain(record, f"{file}, step {step}") for step, record in found]


def collect(records: Sequence[tuple[Path, Record]]) -> list[Row]:
    """One row for all records that differ only in their seed; of a repeated seed, the newest result counts."""
    groups: dict[str, list[tuple[Path, Record]]] = {}
    for path, record in sorted(records, key=lambda pair: pair[1].date, reverse=True):
        group = groups.setdefault(json.dumps([*_table(record), *_row_key(record)], sort_keys=True), [])
        again = next((other for other in group if _again(record, other[1])), None)
        if again is None:
            group.append((path, record))
        elif again[1] != record:
            seeds = ", ".join(map(str, record.seeds))
            log.warning("%s (seed %s) is left out: the same was measured again later, in %s", path, seeds, again[0])
    rows = [_row(group) for group in groups.values()]
    return sorted(rows, key=lambda row: (*map(str, _table(row.record)), row.record.model))


def _again(one: Record, other: Record) -> bool:
    """Whether two records of one row measured the same thing."""
    if one.random_weights:  # made by the first seed; the seeds of a probe follow it and may overlap
        return one.seeds[:1] == other.seeds[:1]
    return one.randomness == "" or not set(one.seeds).isdisjoint(
        other.seeds
    )  # without anything random all seeds are one


def _table(record: Record) -> tuple[Any, ...]:
    """What records must share to be compared."""
    return record.protocol, record.version, record.rule, record.split, record.data.fingerprint


def _row_key(record: Record) -> tuple[Any, ...]:
    """What records of a table must share to be those of one model with one set of settings, over several seeds."""
    left_out = [name for name, _ in record.left_out or ()]
    return record.identity, record.data.samples, left_out, _settings(record)


def _settings(record: Record) -> dict[str, Any]:
    """Those that say what was computed, and the preprocessing. Neither the seed is among them nor how many there are."""
    seen = flat({"preprocessing": record.preprocessing or {}})
    own = {key: value for key, value in flat(record.settings).items() if key not in {"run.seed", "seeds", *FREE}}
    return own | seen


def _row(group: Sequence[tuple[Path, Record]]) -> Row:
    """The mean of a group's records, the newest first. Each may itself be a mean over seeds."""
    records = [record for _, record in group]
    counts, metrics, deviations = {}, {}, {}
    for name in dict.fromkeys(name for record in records for name in record.metrics):
        known = [(max(len(record.seeds), 1), record) for record in records if name in record.metrics]
        total = counts[name] = sum(n for n, _ in known)
        mean = metrics[name] = sum(n * record.metrics[name] for n, record in known) / total
        # Squares within each record, and between it and the mean of all.
        if total > 1 and all(n == 1 or name in record.deviations for n, record in known):
            squares = sum(
                (n - 1) * record.deviations.get(name, 0.0) ** 2 + n * (record.metrics[name] - mean) ** 2
                for n, record in known
            )
            deviations[name] = math.sqrt(squares / (total - 1))
    seconds = [record.seconds for record in records if record.seconds is not None]
    merged = dataclasses.replace(
        records[0],
        metrics=metrics,
        deviations=deviations,
        seeds=tuple(sorted(seed for record in records for seed in record.seeds)),
        items=mean_items([record.items or {} for record in records], [len(record.seeds) or 1 for record in records]),
        seconds=sum(seconds) if len(seconds) == len(records) else None,
    )
    return Row(merged, _settings(records[0]), counts, tuple(sorted(str(path) for path, _ in group)))


# ---- tables ----------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """The content of a table, in any format."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]
    """Sentences."""


def markdown(rows: Sequence[Row]) -> str:
    """A table for each protocol, rule and split of data, with notes about what its figures leave out."""
    return "\n\n".join(in_markdown(described(table)) for table in tables(rows))


def in_markdown(table: Table) -> str:
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (table.header, *table.rows)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---" * len(table.header) + "|")
    heading = [f"### {table.title}", ""] if table.title else []
    return "\n".join([*heading, *lines, *(["", *table.notes] if table.notes else [])])


def described(table: Sequence[Row]) -> Table:
    """The rows of a table, and below them what their figures leave out.

    Settings in which its rows differ get a column each. A paper's figures are added if a row was measured by the same
    rule.
    """
    first = table[0].record
    rule = f"rule {first.rule}" if first.rule is not None else "rule not recorded"
    split = f" {first.split}" if first.split else ""
    samples = " or ".join(map(str, sorted({row.record.data.samples for row in table})))
    names, differing = shown_metrics(table), differing_settings(table)
    rows: list[list[str]] = []

    def add(model: str, weights: str, settings: Mapping[str, Any], figures: Sequence[str], seeds: str) -> None:
        shown = ", ".join(f"{key}={settings[key]}" for key in differing if key in settings)
        rows.append([model, weights, *([shown] if differing else []), *figures, seeds])

    for row in table:
        add(row.record.model, weights_of(row), row.settings, [figure_of(row, name) for name in names], _seeds(row))
    if how := next(filter(None, map(same_rule, table)), None):
        for title, metrics in printed(how):
            if any(name in metrics for name in names):
                figures = [f"{metrics[name]:g}" if name in metrics else "-" for name in names]
                add(title, "-", how.fixed, figures, "-")
    said = [f"{row.record.model}: {note}." for row in table for note in notes(row.record)]
    if old := [row.record.model for row in table if row.record.weights is None]:
        said.append(
            f"{', '.join(old)}: of format 1, which records neither weights nor rule, so only the model's name identifies "
            "it: evaluate again."
        )
    return Table(
        f"{first.protocol} (version {first.version}, {rule}) on {first.data.name}{split}, {samples} samples",
        ["model", "weights", *(["settings"] if differing else []), *map(with_unit, names), "seeds"],
        rows,
        list(dict.fromkeys(said)),
    )


def same_rule(row: Row) -> Protocol | None:
    """The papers' protocol by which a row was measured: the same rule, data and settings; None if it is none."""
    record = row.record
    same = (
        how
        for how in protocols().values()
        if (how.measured_by, how.rule) == (record.protocol, record.rule)
        and how.samples in (None, record.data.samples)
        and all(row.settings.get(key) == value for key, value in how.fixed.items())
    )
    return None if record.left_out else next(same, None)


def printed(how: Protocol) -> Iterator[tuple[str, Mapping[str, float]]]:
    """What the papers have printed under a protocol: whose it is and where, and the figures."""
    for model in models().values():
        for result in model.results:
            if result.protocol == how.id:
                yield f"{model.name} ({result.source})", result.metrics
    for kind in ("supervised", "random"):
        if kind in how.baselines:
            yield f"{kind} ({papers()[how.baselines['paper']].name}'s paper)", how.baselines[kind]


def tables(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that may be compared."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(_table(row.record), []).append(row)
    return list(found.values())


def shown_metrics(table: Sequence[Row]) -> list[str]:
    """The metrics of a table; those of single classes (IoU/sky, in format 1) are only in the files."""
    return list(dict.fromkeys(name for row in table for name in row.record.metrics if "/" not in name))


def differing_settings(table: Sequence[Row]) -> list[str]:
    """The settings in which rows differ; a model's own normalization counts only where one model has several."""

    def differs(key: str) -> bool:
        own: dict[tuple[str, ...], set[str]] = {}
        for row in table:
            of = row.record.identity if key.startswith(("preprocessing.mean", "preprocessing.std")) else ()
            own.setdefault(of, set()).add(json.dumps(row.settings.get(key)))
        return any(len(values) > 1 for values in own.values())

    return [key for key in dict.fromkeys(key for row in table for key in row.settings) if differs(key)]


def weights_of(row: Row) -> str:
    """The first digits of the fingerprint, which distinguish models of one name."""
    if row.record.random_weights:
        return "random"
    return row.record.weights[:12] if row.record.weights else "not recorded"


def figure_of(row: Row, name: str) -> str:
    """The mean with its deviation, as it is printed."""
    record = row.record
    if name not in record.metrics:
        return "-"
    deviation = f" ± {in_digits(name, record.deviations[name])}" if name in record.deviations else ""
    fewer = f" ({row.counts[name]} of {len(record.seeds)} seeds)" if row.counts[name] < len(record.seeds) else ""
    return f"{in_digits(name, record.metrics[name])}{deviation}{fewer}"


def _seeds(row: Row) -> str:
    """How many, and what they decide, which is what the deviations are over."""
    count, own = len(row.record.seeds), row.record.randomness
    parts = [f"{len(row.files)} of random weights"] if row.record.random_weights else []
    if own:
        parts.append(f"{count} of {own}")
    return ", ".join(parts) or ("nothing random" if own is not None else str(count))
