"""Does pre-training beat random weights? A linear layer on frozen maps of both, on the same images and masks.

    python -m benchmarks.dense_probe --data CAMVID --model pre-trained=RUN [--random resnet18]

A random backbone is drawn anew for each seed; a given one is the same for all, and its features are made once. About
eight minutes on two cores for two ResNet-18 and CamVid's 600 images of 240x180 pixels.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from clove_hub.evaluation.command import parse_settings
from clove_hub.evaluation.result import Record
from clove_hub.evaluation.run import run_protocol
from clove_hub.evaluation.scores import mean_and_deviation
from clove_hub.weights import load_backbone

from .report import RESULTS, ROOT, commit, hardware, rounded, versions
from .setting import command

SETTINGS = {"height": 180, "width": 240}
"""A quarter of the pixels of CamVid's 480x360: a CPU is to be done within minutes."""


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dense_probe",
        description="The dense probe of random and of given backbones, over several seeds.",
    )
    parser.add_argument("--data", required=True, type=Path, help="a folder of images and masks, as CamVid's")
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=SOURCE", help="a backbone; may be given several times"
    )
    parser.add_argument("--random", action="append", metavar="ARCHITECTURE", help="with random weights (resnet18)")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--recipe", default=None, help="how the given backbones were pre-trained, for the record")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON file goes")
    parser.add_argument("--name", default="dense_probe", help="of the JSON file (default: %(default)s)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the protocol")
    options = parser.parse_args(given)
    if options.seeds < 1:
        raise ValueError(f"--seeds is {options.seeds}; expected at least 1")
    device = torch.device(options.device)
    settings = SETTINGS | parse_settings(options.settings)
    models = dict(_named(item) for item in options.model)

    rows = []
    for architecture in options.random or ["resnet18"]:
        source = f"random:{architecture}"
        records = [_probe(source, device, options.data, settings, seed, 1) for seed in range(options.seeds)]
        means, deviations = mean_and_deviation([record.metrics for record in records])
        seeds = tuple(range(options.seeds))
        rows.append((source, dataclasses.replace(records[0], metrics=means, deviations=deviations, seeds=seeds)))
        _say(*rows[-1])
    for name, source in models.items():
        rows.append((name, _probe(source, device, options.data, settings, 0, options.seeds)))
        _say(*rows[-1])

    record = {
        "benchmark": "dense_probe",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(ROOT),
        "hardware": hardware(device),
        "versions": versions(),
        "protocol": {"name": rows[0][1].protocol, "version": rows[0][1].version},
        "settings": {key: value for key, value in rows[0][1].settings.items() if key != "seeds"},
        "data": dataclasses.asdict(rows[0][1].data),
        "recipe": options.recipe,
        "rows": [
            {"name": name, "metrics": row.metrics, "deviations": row.deviations, "seeds": list(row.seeds)}
            for name, row in rows
        ],
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{options.name}_{device.type}.json"
    path.write_text(json.dumps(rounded(record), indent=2) + "\n")
    print(f"-> {path}\n", flush=True)


def _named(item: str) -> tuple[str, str]:
    name, equals, source = item.partition("=")
    if not (name and equals and source):
        raise ValueError(f"--model {item}: expected NAME=SOURCE, such as pre-trained=runs/photos")
    return name, source


def _probe(source: str, device: torch.device, data: Path, settings: Mapping[str, Any], seed: int, seeds: int) -> Record:
    backbone = load_backbone(source, seed=seed)
    settings = {**settings, "seeds": seeds}
    return run_protocol(
        "dense-probe", backbone.model.to(device), backbone.preprocessing, data, settings, seed, backbone.name
    )


def _say(name: str, record: Record) -> None:
    """One line of the table."""
    figures = (
        f"{metric} {value:6.2f} ± {record.deviations.get(metric, 0):.2f}" for metric, value in record.metrics.items()
    )
    print(f"{name:32}{'   '.join(figures)}", flush=True)


if __name__ == "__main__":
    command(main)
