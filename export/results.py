"""`clove-hub results DIR...`: the results of evaluation and fine-tuning in one table, with what seeds make of them."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clove_hub.command import Command, user_path
from clove_hub.data.files import Data
from clove_hub.evaluation.result import FREE, Record, read
from clove_hub.settings import flat
from clove_hub.zoo.models import protocols

log = logging.getLogger(__name__)

NAMES = ("results.json", "result.json")
# What the Hub calls the tasks of the protocols that are no paper's.
TASKS = {
    "torchvision-detection": "object-detection",
    "torchvision-instances": "instance-segmentation",
    "torchvision-keypoints": "keypoint-detection",
    "torchvision-segmentation": "image-segmentation",
    "knn": "image-classification",
    "linear-svm": "image-classification",
    "dense-probe": "image-segmentation",
    "fcn": "image-segmentation",
    "retrieve": "image-segmentation",
    "propagate": "video-segmentation",
}


@dataclass(frozen=True)
class Row:
    """One model under one protocol with one set of settings, over all seeds that were found."""

    protocol: str
    version: int
    model: str
    data: Data
    settings: dict[str, Any]
    """By dotted name; the seed is not among them."""
    metrics: dict[str, float]
    """Means over the seeds."""
    deviations: dict[str, float]
    """Sample standard deviations over the seeds; empty for one seed."""
    seeds: tuple[int, ...]
    files: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", type=user_path, metavar="DIR", help=f"searched for {' and '.join(NAMES)}; or a file"
    )
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--plot", type=user_path, metavar="FILE", help="draw the rows, as .png, .pdf or .svg")
    parser.add_argument(
        "--into", type=user_path, metavar="BUNDLE", help="write the rows into this bundle's card as reproduced"
    )


def run(options: argparse.Namespace) -> int:
    rows = collect(find(options.paths))
    print(markdown(rows))
    if options.json:
        options.json.write_text(json.dumps([_plain(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    if options.plot:
        draw(rows, options.plot)
    if options.into:
        write_into(options.into, rows)
        print(f"{options.into}: {len(rows)} results are in its card")
    return 0


RESULTS = Command(
    "Collect results into a table: mean and deviation over seeds, a row for each model.", add_arguments, run
)


def find(paths: Sequence[Path]) -> list[tuple[Path, Record]]:
    """The records in files, and in all that folders hold.

    Raises:
        ValueError: a path is absent, a folder holds none, or a file is no record.
    """
    files: list[Path] = []
    for path in paths:
        found = [path] if path.is_file() else sorted(file for name in NAMES for file in path.rglob(name))
        if not found:
            raise ValueError(f"{path} {'has no ' + ' or '.join(NAMES) if path.is_dir() else 'does not exist'}")
        files += [file for file in found if file not in files]
    return [(file, read(file)) for file in files]


def collect(records: Sequence[tuple[Path, Record]]) -> list[Row]:
    """A row for all records that differ in their seed alone; a seed that was run twice counts by its newest result."""
    groups: dict[str, list[tuple[Path, Record]]] = {}
    for path, record in sorted(records, key=lambda pair: pair[1].date, reverse=True):
        data = (record.data.name, record.data.fingerprint, record.data.samples)
        key = json.dumps([record.protocol, record.version, record.model, data, _settings(record)], sort_keys=True)
        group = groups.setdefault(key, [])
        twice = {seed for _, other in group for seed in other.seeds} & set(record.seeds)
        if twice:
            log.warning("%s is left out: seed %s was run again later", path, ", ".join(map(str, sorted(twice))))
        else:
            group.append((path, record))
    rows = [_row(group) for group in groups.values()]
    return sorted(rows, key=lambda row: (row.protocol, row.version, row.data.name, row.data.fingerprint, row.model))


def markdown(rows: Sequence[Row]) -> str:
    """A table for each protocol and data set; settings in which its rows differ stand in a column of their own."""
    parts = []
    for table in _tables(rows):
        first = table[0]
        head = f"{first.protocol} (version {first.version}) on {first.data.name}, {first.data.samples} samples"
        names = _shown(table)
        differing = _differing(table)
        columns = ["model", *(["settings"] if differing else []), *names, "seeds"]
        lines = [f"### {head}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for row in table:
            settings = ", ".join(f"{key}={row.settings.get(key)}" for key in differing)
            figures = [_figure(row, name) for name in names]
            cells = [row.model, *([settings] if differing else []), *figures, str(len(row.seeds))]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars for each protocol and data set: the metrics side by side, a color for each row, deviations as whiskers."""
    from matplotlib.figure import Figure

    tables = list(_tables(rows))
    figure = Figure(figsize=(9, 3.4 * len(tables)), layout="constrained")
    for axes, table in zip(figure.subplots(len(tables), 1, squeeze=False)[:, 0], tables, strict=True):
        names, differing = _shown(table), _differing(table)
        width = 0.8 / len(table)
        for number, row in enumerate(table):
            places = [place + (number - (len(table) - 1) / 2) * width for place in range(len(names))]
            values = [row.metrics.get(name, math.nan) for name in names]
            errors = [row.deviations.get(name, 0.0) for name in names]
            label = ", ".join([row.model, *(f"{key}={row.settings.get(key)}" for key in differing)])
            axes.bar(places, values, width, yerr=errors if row.deviations else None, capsize=3, label=label)
        axes.set_xticks(range(len(names)), names)
        axes.set(title=f"{table[0].protocol} on {table[0].data.name}", ylabel="percent")
        axes.grid(axis="y", alpha=0.25)
        axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:  # an ending that matplotlib does not know
        raise ValueError(f"--plot {path}: {error}") from error


def write_into(bundle: Path, rows: Sequence[Row]) -> None:
    """Writes the rows into the bundle's card as reproduced with its weights.

    Raises:
        ValueError: it is no bundle, or the rows were measured with other weights or are of several models.
    """
    from clove_hub.weights import load

    from .bundle import add_results

    models = {row.model for row in rows}
    if len(models) > 1:
        raise ValueError(
            f"the results are of {len(models)} models ({', '.join(sorted(models))}), but {bundle} holds one: name the "
            "folders of its own results only"
        )
    own = load(f"local-dir:{bundle}").fingerprint
    for row in rows:
        if row.settings.get("backbone", own) != own:
            raise ValueError(f"{', '.join(row.files)} was measured with other weights than those of {bundle}")
    add_results(
        bundle,
        [
            {
                "protocol": f"{row.protocol}, version {row.version}",
                "task": task(row.protocol),
                "dataset": row.data.name,
                "dataset_type": row.data.name.lower(),
                "split": "val",
                "settings": described(row),
                "metrics": {name: round(row.metrics[name], 2) for name in _shown([row])},
            }
            for row in rows
        ],
    )


def task(protocol: str) -> str:
    """What the Hub calls the task of a protocol, one of the papers' or our own."""
    papers = protocols()
    return papers[protocol].task if protocol in papers else TASKS.get(protocol, "image-feature-extraction")


def described(row: Row) -> str:
    """What a reader of a card must know of a result, in a line."""
    settings, seeds = row.settings, f"mean of {len(row.seeds)} seeds" if len(row.seeds) > 1 else f"seed {row.seeds[0]}"
    if "batch.total" in settings:
        said = f"{settings['steps']} steps of {settings['batch.total']} of {settings['train_images']} images"
    else:
        said = ", ".join(f"{key}={value}" for key, value in settings.items())
    return "; ".join(filter(None, (said, seeds)))


# ---- pieces ----------------------------------------------------------------------------------------------------------


def _row(group: Sequence[tuple[Path, Record]]) -> Row:
    records = [record for _, record in group]
    first = records[0]
    metrics, deviations = {}, {}
    for name in first.metrics:
        known = [record for record in records if name in record.metrics]
        counts = [max(len(record.seeds), 1) for record in known]
        total = sum(counts)
        mean = sum(n * record.metrics[name] for n, record in zip(counts, known, strict=True)) / total
        # Each record may itself be a mean over seeds: squares within it, and between it and the mean of all.
        squares = sum(
            (n - 1) * record.deviations.get(name, 0.0) ** 2 + n * (record.metrics[name] - mean) ** 2
            for n, record in zip(counts, known, strict=True)
        )
        metrics[name] = mean
        if total > 1:
            deviations[name] = math.sqrt(squares / (total - 1))
    seeds = tuple(sorted(seed for record in records for seed in record.seeds))
    files = tuple(sorted(str(path) for path, _ in group))
    return Row(
        first.protocol, first.version, first.model, first.data, _settings(first), metrics, deviations, seeds, files
    )


def _settings(record: Record) -> dict[str, Any]:
    """Those that say what was computed; the seed is not among them."""
    return {key: value for key, value in flat(record.settings).items() if key not in {"run.seed", *FREE}}


def _tables(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows that may be compared."""
    tables: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        tables.setdefault((row.protocol, row.version, row.data.name, row.data.fingerprint), []).append(row)
    yield from tables.values()


def _shown(table: Sequence[Row]) -> list[str]:
    """The metrics of a table; those of single classes (IoU/sky) are only in the files."""
    return list(dict.fromkeys(name for row in table for name in row.metrics if "/" not in name))


def _differing(table: Sequence[Row]) -> list[str]:
    keys = dict.fromkeys(key for row in table for key in row.settings if key != "backbone")
    return [key for key in keys if len({json.dumps(row.settings.get(key)) for row in table}) > 1]


def _figure(row: Row, name: str) -> str:
    if name not in row.metrics:
        return "-"
    deviation = f" ± {row.deviations[name]:.2f}" if name in row.deviations else ""
    return f"{row.metrics[name]:.2f}{deviation}"


def _plain(row: Row) -> dict[str, Any]:
    return {
        **{key: getattr(row, key) for key in ("protocol", "version", "model", "settings", "metrics", "deviations")},
        "data": {"name": row.data.name, "fingerprint": row.data.fingerprint, "samples": row.data.samples},
        "seeds": list(row.seeds),
        "files": list(row.files),
    }
