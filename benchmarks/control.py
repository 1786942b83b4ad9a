"""Do the protocols see what weights know? `python -m benchmarks.control --weights SOURCE --data FOLDER --seed N`.

A positive control: weights that were trained elsewhere on ImageNet's labels beside random ones, by every protocol of the suite
`quick`, on real photos: streets with masks (CamVid), clips, photos with COCO's annotations.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

import clove_hub
from clove_hub.data.finder import some_images
from clove_hub.evaluation.suite import evaluate_suite

from . import labeled, report
from .report import RESULTS
from .setting import command


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.control", description="Trained weights beside random ones."
    )
    parser.add_argument("--weights", required=True, metavar="SOURCE", help="weights that were trained elsewhere")
    parser.add_argument("--streets", type=Path, required=True, metavar="DIR", help="images with masks, as CamVid's")
    parser.add_argument("--clips", type=Path, required=True, metavar="DIR", help="clips with masks, as DAVIS's")
    parser.add_argument(
        "--coco", type=Path, required=True, metavar="DIR", help="photos with COCO's annotations, train and val"
    )
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR", help="photos without labels")
    parser.add_argument("--suite", default="quick", help="of evaluation (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the report and the results stay (default: nowhere)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON file goes")
    options = parser.parse_args(given)
    weights = clove_hub.load_backbone(options.weights).weights
    assert weights is not None
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        photos = some_images(options.photos).paths
        folders = [
            options.streets,
            options.clips,
            options.photos,
            labeled.class_folders(options.coco, made / "kinds"),
            labeled.voc_like(options.coco, made / "objects"),
            labeled.pairs(photos[:: max(len(photos) // 40, 1)], made / "views"),
            labeled.depths(options.streets, made / "rows", 100, 50),
            seen := labeled.frames(options.clips, made / "frames", 3),
        ]
        rows = evaluate_suite(options.suite, [options.weights], folders, options.out or made / "report")
        sources = [(options.weights, 0), *((f"random:{weights.architecture}", seed) for seed in range(3))]
        cut = [clove_hub.evaluate("discover", source, seen, seed=seed, rule="tokencut") for source, seed in sources]
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        record = row.record
        which = "random" if record.random_weights else "trained"
        measured = figures.setdefault(f"{record.protocol} on {record.data.name}", {})
        measured[which] = dict(record.metrics)
        measured[f"{which}, deviation"] = dict(record.deviations)
    # LOST is made for the keys of a vision transformer: its box is nearly the whole image with this network, and with random weights
    # it is. In the frames of clips an object is far smaller than the image.
    trained, *random = (record.metrics["CorLoc"] for record in cut)
    figures["discover by tokencut on frames"] = {
        "trained": {"CorLoc": trained},
        "random": {"CorLoc": statistics.mean(random)},
        "random, deviation": {"CorLoc": statistics.stdev(random)},
    }
    for title, measured in figures.items():
        name = next(iter(measured["trained"]))
        print(f"{title:<32} {name:<16} {measured['trained'][name]:8.2f} {measured['random'][name]:8.2f}")
    report.save(
        "control",
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        options.results,
        weights={
            "name": Path(options.weights).name,
            "architecture": weights.architecture,
            "fingerprint": weights.fingerprint,
        },
        suite=options.suite,
        figures=figures,
    )


if __name__ == "__main__":
    command(main)
