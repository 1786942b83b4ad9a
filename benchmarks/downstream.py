"""What pre-training is worth: `python -m benchmarks.downstream --data COCO --backbone SOURCE [--against SOURCE ...]`.

The pre-trained backbone and others (random weights unless said otherwise) are fine-tuned by the command that users
type, as detectors or for another task, with the same settings, images, order and heads, once for each seed; then scored
on the validation images. Runs that were stopped go on where they were.

`--categories person` asks for less: with 200 photos and a few minutes, people can be found, 80 categories not told
apart.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from clove_hub import cli
from clove_hub.evaluation.collected import Row, collect, find, markdown
from clove_hub.training.finetune.settings import TASKS, as_sections, read_settings

from . import report
from .setting import arguments, command, positive

# What two cores do in a few minutes.
CPU_RUN = {
    "optimizer.learning_rate": "0.04",
    "schedule.steps": "200",
    "schedule.warmup_steps": "40",
    "run.precision": "fp32",
    "run.precise_bn": "20",
    "run.pictures": "6",
    "data.workers": "1",
}
# Small images, few proposals, four passes over 200 photos.
CPU_DETECTION = CPU_RUN | {
    "images.shortest_edge": "[128,144,160]",
    "images.longest_edge": "240",
    "network.head": "mlp",
    "network.rois": "64",
    "network.proposals": "200",
    "batch.total": "4",
}
CPU_SEGMENTATION = CPU_RUN | {"images.crop": "192", "images.scale": "[0.75,1.5]", "batch.total": "8"}
CUDA = {"batch.total": "8", "schedule.steps": "2000"}


def main(given: list[str] | None = None) -> None:
    parser = arguments("downstream", "Fine-tunes pre-trained and random backbones alike, and compares.", data=True)
    parser.add_argument("--backbone", required=True, metavar="SOURCE", help="the pre-trained backbone")
    parser.add_argument(
        "--against", action="append", metavar="SOURCE", help="compared with (default: random weights of the same)"
    )
    parser.add_argument(
        "--categories",
        nargs="*",
        default=[],
        metavar="NAME",
        help="of the data, only these: a few hundred steps on 200 photos cannot tell 80 apart, but can find people",
    )
    parser.add_argument("--task", choices=TASKS, default="detection", help="default: %(default)s")
    parser.add_argument("--recipe", default=None, help="how the given backbone was pre-trained, for the record")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark_downstream"), help="folder of all runs")
    parser.add_argument("--again", action="store_true", help="remove what is in --runs first")
    parser.set_defaults(rounds=3)
    options = parser.parse_args(given)
    positive([("--rounds", options.rounds)])
    cpu = CPU_SEGMENTATION if options.task == "segmentation" else CPU_DETECTION
    defaults = cpu if options.device == "cpu" else CUDA
    changes = [f"{key}={value}" for key, value in defaults.items()] + options.overrides
    settings = read_settings(options.task, changes)
    if options.again:
        shutil.rmtree(options.runs, ignore_errors=True)
    data = only(Path(options.data), options.categories, options.runs / "data") if options.categories else options.data

    sides = {"ours": options.backbone}
    for number, source in enumerate(options.against or [f"random:{architecture(options.backbone)}"]):
        sides[f"against{number}"] = source
    seconds = dict.fromkeys(sides, 0.0)
    for seed in range(options.rounds):  # by turns, so that each seed is complete before the next
        for side, source in sides.items():
            out = options.runs / side / f"seed{seed}"
            began = time.perf_counter()
            code = cli.main(
                [
                    "downstream",
                    "torchvision",
                    options.task,
                    "--backbone",
                    source,
                    "--data",
                    str(data),
                    "--out",
                    str(out),
                    *changes,
                    f"run.seed={seed}",
                ]
            )
            if code:
                raise ValueError(f"the run {out} ended with exit code {code}; the reason is above")
            seconds[side] += time.perf_counter() - began

    found = {side: collect(find([options.runs / side]))[0] for side in sides}
    print(markdown(list(found.values())))
    metric = next(iter(found["ours"].record.metrics))
    rows = [
        report.Row(
            f"{metric} of {label(row.record.model)}, {len(row.record.seeds)} seeds",
            "percent",
            row.record.metrics[metric],
        )
        for row in found.values()
    ]
    report.write(
        options.name,
        torch.device(options.device),
        rows,
        as_sections(settings)
        | {"dataset": Path(options.data).resolve().name, "categories": options.categories, "runs_seconds": seconds},
        options.reference,
        options.results,
        sides={side: described(row) for side, row in found.items()},
        gains={side: gain(found["ours"], row, options.runs, metric) for side, row in found.items() if side != "ours"},
        losses={side: losses(options.runs / side) for side in sides},
        recipe=options.recipe,
    )


def only(data: Path, names: list[str], folder: Path) -> Path:
    """The data set with the annotations of these categories alone, on the same images."""
    for path in sorted((data / "annotations").glob("instances_*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if absent := set(names) - {row["name"] for row in document["categories"]}:
            raise ValueError(f"{path} has no category {', '.join(sorted(absent))}")
        document["categories"] = [row for row in document["categories"] if row["name"] in names]
        kept = {row["id"] for row in document["categories"]}
        document["annotations"] = [row for row in document["annotations"] if row["category_id"] in kept]
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        (folder / "annotations" / path.name).write_text(json.dumps(document), encoding="utf-8")
        images = path.stem.removeprefix("instances_")
        if not (folder / images).exists():
            (folder / images).symlink_to((data / images).resolve())
    return folder


def architecture(backbone: str) -> str:
    """Of the pre-trained backbone, by its name in timm."""
    from clove_hub.weights import load

    return load(backbone).architecture


def label(source: str) -> str:
    """A run or bundle by its folder's name: where it lies on this machine is nobody's concern."""
    return Path(source).name if Path(source).is_dir() else source


def described(row: Row) -> dict[str, Any]:
    return {
        "model": label(row.record.model),
        "seeds": list(row.record.seeds),
        "metrics": row.record.metrics,
        "deviations": row.record.deviations,
    }


def gain(ours: Row, other: Row, runs: Path, metric: str) -> dict[str, Any]:
    """How much more ours has: the mean, and seed by seed."""
    values = []
    for a, b in zip(ours.files, other.files, strict=True):
        pair = [json.loads(Path(file).read_text())["metrics"][metric] for file in (a, b)]
        values.append(pair[0] - pair[1])
    return {"metric": metric, "mean": statistics.mean(values), "each": values}


def losses(runs: Path) -> list[float]:
    """The mean loss over the last fifth of the rows of metrics, for each seed."""
    means = []
    for path in sorted(runs.glob("seed*/metrics.jsonl")):
        values = [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        means.append(statistics.mean(values[-max(len(values) // 5, 1) :]))
    return means


if __name__ == "__main__":
    command(main)
