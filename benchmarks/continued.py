"""Whether training on helps: `python -m benchmarks.continued --weights BUNDLE --data PHOTOS --labeled CAMVID [section.key=value ...]`.

A positive control with weights that were trained elsewhere: what `correspond` (on the photos) and `dense-probe` (on labeled images)
say of random weights, of the weights that one begins with, and of what the recipe `clove_r50_continue` makes of them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import clove_hub
from clove_hub.runs import read_rows
from clove_hub.settings import Given

from . import report
from .report import RESULTS
from .setting import command

RECIPE = "clove_r50_continue"


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.continued", description="Before and after training on.")
    parser.add_argument("--weights", required=True, metavar="SOURCE", help="trained weights to begin with")
    parser.add_argument("--data", type=Path, required=True, metavar="PHOTOS", help="a folder of photos to train on")
    parser.add_argument("--labeled", type=Path, required=True, metavar="DIR", help="images with masks, as CamVid's")
    parser.add_argument("--images", type=int, default=200, help="photos of correspond (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON file goes")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="'NAME section.key=value ...'",
        help="further changes, as a training of its own; may be given several times",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=f"changes to the recipe {RECIPE}")
    options = parser.parse_args(given)
    variants = [variant.split() for variant in options.variant] or [["trained on"]]
    protocols = (
        ("correspond", options.data, {"images": options.images}),
        ("dense-probe", options.labeled, {"height": 180, "width": 240}),
    )

    def measured(source: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for protocol, data, settings in protocols:
            record = clove_hub.evaluate(protocol, source, data, **settings)
            found |= {f"{protocol}/{name}": value for name, value in record.metrics.items()}
        print(source, {name: round(value, 2) for name, value in found.items()}, flush=True)
        return found

    weights = clove_hub.load_backbone(options.weights).weights
    assert weights is not None
    figures = {
        "random": measured(f"random:{weights.architecture}"),
        "starting weights": measured(options.weights),
    }
    trainings: dict[str, dict[str, Any]] = {}
    for name, *words in variants:
        changes = dict(word.partition("=")[::2] for word in [*options.overrides, *words])
        with tempfile.TemporaryDirectory() as folder:
            run, began = Path(folder) / "run", time.perf_counter()
            where = {"data.path": str(options.data), "run.output": str(run), "backbone.pretrained": options.weights}
            network = {"backbone.model": weights.architecture}
            settings: dict[str, Any] = where | network | {key: Given(value) for key, value in changes.items()}
            result = clove_hub.pretrain(RECIPE, **settings)
            seconds = time.perf_counter() - began
            figures[name] = measured(str(run))
            way = [{"step": row["step"], **row["record"]["metrics"]} for row in read_rows(run / "evaluations.jsonl")]
        trainings[name] = {
            "changes": {key: value for key, value in changes.items() if key != "evaluate"},  # which names a folder
            "steps": result.steps,
            "seconds": round(seconds, 1),
            "on_the_way": way,
        }
        report.save(  # after each, so that one that is cut off loses nothing
            "continued",
            torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            options.results,
            weights={
                "name": Path(options.weights).name,
                "architecture": weights.architecture,
                "fingerprint": weights.fingerprint,
            },
            recipe=RECIPE,
            figures=figures,
            trainings=trainings,
        )


if __name__ == "__main__":
    command(main)
