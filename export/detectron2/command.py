"""`clove-hub downstream detectron2 TASK --backbone SOURCE [--data FOLDER] [--gpus N] [--runs N] [--dry-run] [KEY VALUE ...]`."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from clove_hub.command import Command, user_path
from clove_hub.weights import SOURCE
from clove_hub.zoo.models import protocols

from .tasks import TASKS, Order

DATA = "DETECTRON2_DATASETS"
OWN = {
    "detection": "Faster R-CNN with a feature pyramid on your own photos",
    "instances": "Mask R-CNN with a feature pyramid on your own photos",
}
OWN_DATA = """tasks on your own photos, --data FOLDER:
  detection, instances   FOLDER/annotations/instances_{train,val}.json, FOLDER/{train,val}/ (or COCO's ..2017),
                         or FOLDER/{train,valid}/_annotations.coco.json beside the images (Roboflow)
  detection              PASCAL VOC's layout, or FOLDER/{train,val}/*.xml beside the images"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    width = max(map(len, TASKS))
    tasks = "\n".join(f"  {name:<{width}}  {protocols()[name].settings}" for name in TASKS)
    parser.epilog = (
        f"tasks of the papers:\n{tasks}\n\n{OWN_DATA}\n\nKEY VALUE: Detectron2's keys, as in SOLVER.IMS_PER_BATCH 8. Learning rate and "
        "schedule follow the batch\nunless they are given too.\n\nExit code 75 means: stopped by SIGTERM, SIGHUP or SIGUSR1 "
        "after saving (130: by Ctrl-C); start the same\ncommand again to go on."
    )
    parser.add_argument("task", choices=(*TASKS, *OWN), metavar="TASK", help="one of those below")
    parser.add_argument("--backbone", required=True, metavar="SOURCE", help=SOURCE)
    parser.add_argument(
        "--data",
        type=user_path,
        metavar="FOLDER",
        help=f"folder of data sets (default: ${DATA}, or datasets); for detection and instances, of your photos",
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="default: all; 0 for the CPU")
    parser.add_argument(
        "--runs", type=int, metavar="N", help="seeds (default: 5, as in the papers; 1 on your own photos)"
    )
    parser.add_argument("--fraction", type=float, default=1.0, help="fraction of COCO's images: 0.01, 0.02, 0.05, 0.1")
    parser.add_argument("--out", type=user_path, metavar="DIR", help="default: runs/downstream/TASK_SOURCE")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and what it would cost")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="changes to Detectron2's config")


def run(options: argparse.Namespace) -> int:
    own = options.task in OWN
    runs = options.runs if options.runs is not None else 1 if own else 5
    if runs < 1 or not 0 < options.fraction <= 1:
        raise ValueError(
            f"--runs {runs} --fraction {options.fraction:g}: expected at least one run, and a fraction above 0 and up to 1"
        )
    if own and options.data is None:
        raise ValueError(f"{options.task} is trained on your own photos: give --data FOLDER (see --help)")
    # Detectron2 reads it on import, also in the processes that it starts.
    data = os.environ[DATA] = str((options.data or Path(os.environ.get(DATA, "datasets"))).expanduser().resolve())
    from . import suite

    name = re.sub(r"[^\w.-]+", "_", options.backbone).strip("_")
    part = "" if options.fraction == 1 else f"_{options.fraction:g}"
    order = Order(
        task=options.task,
        backbone=options.backbone,
        data=Path(data),
        out=options.out or Path("runs", "downstream", f"{options.task}{part}_{name}"),
        gpus=options.gpus,
        runs=runs,
        overrides=tuple(options.overrides),
        fraction=options.fraction,
    )
    if own:
        from . import own as own_photos

        return own_photos.run(order, options.dry_run)
    if options.dry_run:
        print(suite.rehearse(order))
        return 0
    return suite.run(order)


DETECTRON2 = Command(
    "The papers' fine-tuning tasks in Detectron2, and detectors on your own photos. Given again, the command goes on where it was stopped.",
    add_arguments,
    run,
)
