"""`clove-hub results PATH...`: results of evaluation and fine-tuning in one table, with the spread over seeds."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clove_hub.command import Command, user_path
from clove_hub.evaluation.collected import ROWS, Row, collect, find, markdown, shown_metrics
from clove_hub.evaluation.result import check_writable, in_digits, notes, write_text
from clove_hub.figures.output import FORMATS, require_format, save
from clove_hub.zoo.models import protocols

# The Hub's names for the tasks of the protocols that come from no paper.
TASKS = {
    "torchvision-detection": "object-detection",
    "torchvision-instances": "instance-segmentation",
    "torchvision-keypoints": "keypoint-detection",
    "torchvision-segmentation": "image-segmentation",
    "knn": "image-classification",
    "linear-svm": "image-classification",
    "dense-probe": "image-segmentation",
    "linear-seg": "image-segmentation",
    "in-context": "image-segmentation",
    "cluster": "image-segmentation",
    "retrieve": "image-segmentation",
    "propagate": "video-segmentation",
    "depth": "depth-estimation",
    "match": "keypoint-detection",
    "discover": "object-detection",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    paths = f"a result's file, a run's {ROWS} (the newest step counts), or a folder that is searched for both"
    parser.add_argument("paths", nargs="+", type=user_path, metavar="PATH", help=paths)
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--plot", type=user_path, metavar="FILE", help=f"draw the rows: {', '.join(FORMATS)}")
    into = "write the rows into this bundle's card as reproduced"
    parser.add_argument("--into", type=user_path, metavar="BUNDLE", help=into)


def run(options: argparse.Namespace) -> int:
    if options.plot:
        check_writable(options.plot)
        require_format(options.plot, "--plot")
    rows = collect(find(options.paths))
    print(markdown(rows))
    if options.json:
        found = [dataclasses.asdict(row) for row in rows]
        merged = [row.pop("record") | row for row in found]
        write_text(options.json, json.dumps(merged, indent=1, ensure_ascii=False) + "\n")
    if options.plot:
        from clove_hub.figures.bars import draw_results

        save(draw_results(rows), options.plot, option="--plot")
    if options.into:
        write_into(options.into, rows)
        print(f"{options.into}: wrote {len(rows)} result{'s' if len(rows) > 1 else ''} into its card")
    return 0


RESULTS = Command(
    "Collect results into a table: mean and deviation over seeds, a row for each model.", add_arguments, run
)


# ---- a bundle's card -------------------------------------------------------------------------------------------------


def write_into(bundle: Path, rows: Sequence[Row]) -> None:
    """Write the rows to the bundle's card as reproduced with its weights.

    Raises:
        ValueError: it is not a bundle, or a row is not known to be measured with its weights, used as its card states.
    """
    from clove_hub.weights import load

    from .bundle import add_results

    source = load(f"local-dir:{bundle}")
    again = f"evaluate {bundle} itself with `clove-hub evaluate` or `clove-hub downstream`, and give only those results"
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
                    f"{files} was measured with another {key} of the images than {bundle} states "
                    f"({seen[key]}, not {list(value)}): {again}"
                )
        entries.append(entry(row))
    add_results(bundle, entries)


def entry(row: Row) -> dict[str, Any]:
    """A row as an entry of a card."""
    record = row.record
    how = protocols().get(record.protocol)
    return {
        "protocol": f"{record.protocol}, version {record.version}, rule {record.rule}",
        "task": how.task if how else TASKS.get(record.protocol, "image-feature-extraction"),
        "dataset": record.data.name,
        "dataset_type": record.data.name.lower(),
        "split": record.split or "",
        "settings": described(row),
        "metrics": {name: float(in_digits(name, record.metrics[name])) for name in shown_metrics([row])},
    }


def described(row: Row) -> str:
    """The conditions of a result for the reader of a card, in one line."""
    settings, seeds, own = row.settings, row.record.seeds, row.record.randomness
    over = f"mean of {len(seeds)} seeds of {own}" if len(seeds) > 1 else f"seed {seeds[0]}" if own and seeds else ""
    if {"batch.total", "steps", "train_images"} <= settings.keys():
        said = (
            f"{settings['train_images']} training images, {settings['steps']} steps of {settings['batch.total']} images"
        )
        changed = settings.get("notes")
        said = "; ".join([said, *map(str, changed if isinstance(changed, list) else ())])
    else:
        said = ", ".join(f"{key}={value}" for key, value in settings.items() if not key.startswith("preprocessing."))
    return "; ".join(filter(None, (said, over, *notes(row.record, named=False))))
