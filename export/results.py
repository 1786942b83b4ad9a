"""`clove-hub results PATH...`: results of evaluation and fine-tuning in one table, with what seeds make of them.

A row is one model, identified by its weights' fingerprint, with one set of settings. A table holds what may be compared:
one protocol, version and rule, one split of the same data.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clove_hub.command import Command, user_path
from clove_hub.evaluation.result import FREE, Record, check_writable, from_plain, mean_items, notes, read, write_text
from clove_hub.runs import read_rows
from clove_hub.settings import flat
from clove_hub.zoo.models import Protocol, models, papers, protocols

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

NAMES = ("results.json", "result.json")
"""What must be a record. Of the other JSON files in a folder those are taken that begin as one."""
ROWS = "evaluations.jsonl"
# What the Hub calls the tasks of the protocols that are no paper's.
TASKS = {
    "torchvision-detection": "object-detection",
    "torchvision-instances": "instance-segmentation",
    "torchvision-keypoints": "keypoint-detection",
    "torchvision-segmentation": "image-segmentation",
    "knn": "image-classification",
    "linear-svm": "image-classification",
    "dense-probe": "image-segmentation",
    "retrieve": "image-segmentation",
    "propagate": "video-segmentation",
    "depth": "depth-estimation",
    "match": "keypoint-detection",
    "discover": "object-detection",
}


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    paths = f"a result's file, a run's {ROWS} (the newest step counts), or a folder that is searched for both"
    parser.add_argument("paths", nargs="+", type=user_path, metavar="PATH", help=paths)
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--plot", type=user_path, metavar="FILE", help="draw the rows, as .png, .pdf or .svg")
    into = "write the rows into this bundle's card as reproduced"
    parser.add_argument("--into", type=user_path, metavar="BUNDLE", help=into)


def run(options: argparse.Namespace) -> int:
    rows = collect(find(options.paths))
    print(markdown(rows))
    if options.json:
        found = [dataclasses.asdict(row) for row in rows]
        merged = [row.pop("record") | row for row in found]
        write_text(options.json, json.dumps(merged, indent=1, ensure_ascii=False) + "\n")
    if options.plot:
        check_writable(options.plot)
        try:
            draw(rows).savefig(options.plot, dpi=120)
        except (ValueError, OSError) as error:  # the former of an ending that matplotlib does not know
            raise ValueError(f"--plot {options.plot}: {error}") from error
    if options.into:
        write_into(options.into, rows)
        print(f"{options.into}: {len(rows)} results are in its card")
    return 0


RESULTS = Command(
    "Collect results into a table: mean and deviation over seeds, a row for each model.", add_arguments, run
)


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
    """A row for all records that differ in their seed alone; a seed that was run twice counts by its newest result."""
    groups: dict[str, list[tuple[Path, Record]]] = {}
    for path, record in sorted(records, key=lambda pair: pair[1].date, reverse=True):
        group = groups.setdefault(json.dumps([*_table(record), *_row_key(record)], sort_keys=True), [])
        # Without anything random all seeds are one.
        nothing_random = record.randomness == "" and not record.random_weights
        again = next(
            (other for other in group if nothing_random or not set(record.seeds).isdisjoint(other[1].seeds)), None
        )
        if again is None:
            group.append((path, record))
        elif again[1] != record:
            seeds = ", ".join(map(str, record.seeds))
            log.warning(
                "%s (seed %s) is left out: what it holds was measured again later, in %s", path, seeds, again[0]
            )
    rows = [_row(group) for group in groups.values()]
    return sorted(rows, key=lambda row: (*map(str, _table(row.record)), row.record.model))


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


# ---- tables and pictures ---------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """A table for each protocol, rule and split of data, and below it what its figures leave out.

    Settings in which its rows differ stand in a column of their own. Figures that a paper has printed follow where a row
    was measured by the same rule.
    """
    return "\n\n".join(map(_markdown, _tables(rows)))


def _markdown(table: Sequence[Row]) -> str:
    first = table[0].record
    rule = f"rule {first.rule}" if first.rule is not None else "rule not recorded"
    split = f" {first.split}" if first.split else ""
    samples = " or ".join(map(str, sorted({row.record.data.samples for row in table})))
    names, differing = _shown(table), _differing(table)
    lines = [
        f"### {first.protocol} (version {first.version}, {rule}) on {first.data.name}{split}, {samples} samples",
        "",
        f"| {' | '.join(['model', 'weights', *(['settings'] if differing else []), *names, 'seeds'])} |",
        "|---" * (len(names) + 3 + bool(differing)) + "|",
    ]

    def add(model: str, weights: str, settings: Mapping[str, Any], figures: Sequence[str], seeds: str) -> None:
        shown = ", ".join(f"{key}={settings[key]}" for key in differing if key in settings)
        cells = [model, weights, *([shown] if differing else []), *figures, seeds]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")

    for row in table:
        add(row.record.model, _weights(row), row.settings, [_figure(row, name) for name in names], _seeds(row))
    if how := next(filter(None, map(same_rule, table)), None):
        for title, metrics in printed(how):
            if any(name in metrics for name in names):
                figures = [f"{metrics[name]:g}" if name in metrics else "-" for name in names]
                add(title, "-", how.fixed, figures, "-")
    said = [f"{row.record.model}: {note}." for row in table for note in notes(row.record)]
    if old := [row.record.model for row in table if row.record.weights is None]:
        said.append(
            f"{', '.join(old)}: of format 1, which records neither weights nor rule, so that the model's name alone "
            "identifies it: evaluate again."
        )
    return "\n".join([*lines, *(["", *dict.fromkeys(said)] if said else [])])


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


def draw(rows: Sequence[Row]) -> Figure:
    """Bars for each table: the metrics side by side, a color for each row, deviations as whiskers."""
    from matplotlib.figure import Figure

    tables = _tables(rows)
    heights = [2.8 + 0.2 * len(table) for table in tables]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, table in zip(panels, tables, strict=True):
        names, differing = _shown(table), _differing(table)
        width = 0.8 / len(table)
        for number, row in enumerate(table):
            record = row.record
            places = [place + (number - (len(table) - 1) / 2) * width for place in range(len(names))]
            values = [record.metrics.get(name, math.nan) for name in names]
            errors = [record.deviations.get(name, 0.0) for name in names]
            settings = (f"{key}={row.settings[key]}" for key in differing if key in row.settings)
            label = ", ".join([f"{record.model} ({_weights(row)})", *settings])
            axes.bar(places, values, width, yerr=errors if record.deviations else None, capsize=3, label=label)
        first = table[0].record
        axes.set_xticks(range(len(names)), names)
        axes.set(title=f"{first.protocol} on {first.data.name} {first.split or ''}".rstrip(), ylabel="percent")
        axes.grid(axis="y", alpha=0.25)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1))  # below the bars
    return figure


def _tables(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that may be compared."""
    tables: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        tables.setdefault(_table(row.record), []).append(row)
    return list(tables.values())


def _shown(table: Sequence[Row]) -> list[str]:
    """The metrics of a table; those of single classes (IoU/sky, in format 1) are only in the files."""
    return list(dict.fromkeys(name for row in table for name in row.record.metrics if "/" not in name))


def _differing(table: Sequence[Row]) -> list[str]:
    keys = dict.fromkeys(key for row in table for key in row.settings)
    return [key for key in keys if len({json.dumps(row.settings.get(key)) for row in table}) > 1]


def _weights(row: Row) -> str:
    """The first digits of the fingerprint, which tell models of one name apart."""
    if row.record.random_weights:
        return "random"
    return row.record.weights[:12] if row.record.weights else "not recorded"


def _figure(row: Row, name: str) -> str:
    record = row.record
    if name not in record.metrics:
        return "-"
    deviation = f" ± {record.deviations[name]:.2f}" if name in record.deviations else ""
    fewer = f" ({row.counts[name]} of {len(record.seeds)} seeds)" if row.counts[name] < len(record.seeds) else ""
    return f"{record.metrics[name]:.2f}{deviation}{fewer}"


def _seeds(row: Row) -> str:
    """How many, and what they decide, which is what the deviations are over."""
    count, own = len(row.record.seeds), row.record.randomness
    parts = [f"{len(row.files)} of random weights"] if row.record.random_weights else []
    if own:
        parts.append(f"{count} of {own}")
    return ", ".join(parts) or ("nothing random" if own is not None else str(count))


# ---- a bundle's card -------------------------------------------------------------------------------------------------


def write_into(bundle: Path, rows: Sequence[Row]) -> None:
    """Writes the rows into the bundle's card as reproduced with its weights.

    Raises:
        ValueError: it is no bundle, or not every row is known to be measured with its weights, as its card says that they
            are used.
    """
    from clove_hub.weights import load

    from .bundle import add_results

    source = load(f"local-dir:{bundle}")
    again = f"evaluate {bundle} itself with `clove-hub evaluate` or `clove-hub downstream`, and name those results only"
    entries = []
    for row in rows:
        record, files, own = row.record, ", ".join(row.files), source.fingerprint
        if record.weights is None:
            raise ValueError(f"{files}: format 1 does not record which weights were measured: {again}")
        if record.weights != own:
            raise ValueError(
                f"{files} was measured with other weights ({record.model}, {record.weights[:12]}) than those of {bundle} "
                f"({own[:12]}): {again}"
            )
        seen = record.preprocessing or {}
        for key, value in (("mean", source.preprocessing.mean), ("std", source.preprocessing.std)):
            if seen.get(key, list(value)) != list(value):
                raise ValueError(
                    f"{files} was measured with images of another {key} than {bundle} asks for "
                    f"({seen[key]}, not {list(value)}): {again}"
                )
        how = protocols().get(record.protocol)
        entries.append(
            {
                "protocol": f"{record.protocol}, version {record.version}, rule {record.rule}",
                "task": how.task if how else TASKS.get(record.protocol, "image-feature-extraction"),
                "dataset": record.data.name,
                "dataset_type": record.data.name.lower(),
                "split": record.split or "",
                "settings": described(row),
                "metrics": {name: round(record.metrics[name], 2) for name in _shown([row])},
            }
        )
    add_results(bundle, entries)


def described(row: Row) -> str:
    """What a reader of a card must know of a result, in a line."""
    settings, seeds, own = row.settings, row.record.seeds, row.record.randomness
    over = f"mean of {len(seeds)} seeds of {own}" if len(seeds) > 1 else f"seed {seeds[0]}" if own and seeds else ""
    if {"batch.total", "steps", "train_images"} <= settings.keys():
        said = f"{settings['steps']} steps of {settings['batch.total']} of {settings['train_images']} images"
        changed = settings.get("notes")
        said = "; ".join([said, *map(str, changed if isinstance(changed, list) else ())])
    else:
        said = ", ".join(f"{key}={value}" for key, value in settings.items() if not key.startswith("preprocessing."))
    return "; ".join(filter(None, (said, over, *notes(row.record, named=False))))
