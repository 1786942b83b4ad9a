"""What a healthy run of each method looks like: `python -m benchmarks.curves --data PHOTOS [--pictures docs/methods/curves]`.

Every method trains the same small network for as many steps on the same photos, in minutes on a CPU; the rows that a run logs go to
the JSON file, and a picture of each to the folder of the method pages. They show the shape of the curves, not what the papers' sizes reach.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import clove_hub
from clove_hub.figures.curves import curves, read_run
from clove_hub.figures.output import save
from clove_hub.methods import METHODS
from clove_hub.settings import Given

from . import report
from .report import RESULTS
from .setting import command, positive
from .small import small

RECIPE = {name: f"{name}_r50_in1k_100ep" for name in ("slotcon", "pixpro")} | {
    "clove": "clove_r50_in1k_200ep",
    "moco": "moco_r50_coco_200ep",
    "moco_knn": "moco_knn_r50_coco_200ep",
    "densecl": "densecl_r50_coco_800ep",
    "byol": "byol_r50_in1k_300ep",
}
"""Whose settings a run has, but for its sizes."""
SHOWN_EVERY = 5


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.curves", description="Small runs of every method, drawn."
    )
    parser.add_argument("--data", type=Path, required=True, metavar="PHOTOS", help="a folder of photos")
    parser.add_argument("--steps", type=int, default=200, help="of each method (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS), help="default: all")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="where a picture of each goes")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON file goes")
    options = parser.parse_args(given)
    positive([("--steps", options.steps)])
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.methods:
            run = Path(folder) / name
            sizes = {
                "schedule__steps": options.steps,
                "batch__total": 16,
                "batch__per_device": 16,
                "batch__norm_group": 8,
            }
            lines = small(name, **sizes, run__log_every=SHOWN_EVERY, run__save_every=options.steps)
            given_sizes = {key: Given(value) for key, _, value in (line.partition("=") for line in lines)}
            where = {"data.path": str(options.data), "run.output": str(run)}
            clove_hub.pretrain(RECIPE[name], **given_sizes, **where)
            read = read_run(run)
            dropped = ("images_per_second", "waiting_for_data", "broken_images", "host_memory_gb", "device_memory_gb")
            found[name] = [{key: value for key, value in row.items() if key not in dropped} for row in read.metrics]
            if options.pictures:
                options.pictures.mkdir(parents=True, exist_ok=True)
                save(curves({name: read}), options.pictures / f"{name}.png", 110)
    setting = {"steps": options.steps, "recipes": {name: RECIPE[name] for name in options.methods}}
    report.save("curves", torch.device("cpu"), options.results, settings=setting, rows=found)


if __name__ == "__main__":
    command(main)
