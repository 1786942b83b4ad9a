"""Fine-tuning with torchvision in miniature, by the command that a user types."""

import json
from pathlib import Path

from clove_hub.cli import main

SMALL = {
    "batch.total": 2,
    "data.workers": 0,
    "run.precision": "fp32",
    "run.log_every": 1,
    "run.pictures": 1,
    "run.precise_bn": 1,
    "schedule.steps": 2,
}
# A run's cost is its heads', which no setting makes narrower: few regions, and timm's smallest ResNet beneath.
DETECTOR = SMALL | {
    "images.shortest_edge": "[64]",
    "images.longest_edge": 96,
    "network.head": "mlp",
    "network.rois": 4,
    "network.proposals": 20,
    "network.detections": 2,
}
SEGMENTER = SMALL | {"images.crop": 64, "network.channels": 16}


def put(folder: Path, document: dict, *splits: str) -> None:
    for split in splits or ("train", "val"):
        for stem in ("instances", "person_keypoints"):
            (folder / "annotations" / f"{stem}_{split}.json").write_text(json.dumps(document))


def downstream(
    task: str,
    data: Path,
    out: Path,
    base: dict,
    backbone: str = "random:test_resnet",
    preset: str | None = None,
    **changes: object,
) -> int:
    overrides = base | {key.replace("__", "."): value for key, value in changes.items()}
    arguments = ["--backbone", backbone, "--data", str(data), "--out", str(out)]
    arguments += ["--preset", preset] if preset else []
    return main(["downstream", "torchvision", task, *arguments, *(f"{k}={v}" for k, v in overrides.items())])


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
