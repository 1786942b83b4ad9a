"""Fine-tuning in Detectron2 on your own labeled photos: Faster or Mask R-CNN with a feature pyramid.

It is the detector of Detectron2's model zoo with trained batch norm. No paper has a figure for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from clove_hub.data.coco import Task as CocoTask
from clove_hub.data.files import Data
from clove_hub.evaluation.result import CHANGED, Record, fine_tuning_record, versions
from clove_hub.evaluation.result import write as write_record
from clove_hub.processes import STOPPED
from clove_hub.weights import Weights, load

from ..seeds import Trained, count_gpus
from .config import Resolved, resolve
from .facts import CONFIG
from .own_data import CLASSES, OwnData, read, write, write_classes
from .runs import Training, hold, installed, metrics, plain, require_packages, settings, train_seeds
from .tasks import BOXES, MASKS, SYNC_BN, Order, Task

VERSION = 1
EPOCHS = 36
"""Epochs over the photos, as in the 3x schedules of Detectron2's zoo."""
LEAST, MOST = 1000, 90000
"""Range of iterations: enough for a few photos, and at most COCO's 1x schedule."""
BATCH = 16
OWN: Mapping[str, Task] = {
    "detection": Task(
        zoo="COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        layout="own",
        changes=SYNC_BN | {"MODEL.FPN.NORM": "SyncBN"},
        metrics={"bbox": BOXES},
        seconds=None,
    ),
    "instances": Task(
        zoo="COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        layout="own",
        changes=SYNC_BN | {"MODEL.FPN.NORM": "SyncBN"},
        metrics={"bbox": BOXES, "segm": MASKS},
        seconds=None,
    ),
}


def run(order: Order, dry: bool = False) -> int:
    """Train and score every seed that is not done, and write results.json.

    Args:
        order: the request, with the folder of photos as `data`.
        dry: print the config and its faults, and train nothing.

    Returns:
        The exit code: 0, or STOPPED after a signal.

    Raises:
        ValueError: something is missing or wrong; found before anything is written.
        ChildProcessError, KeyboardInterrupt: from `train`.
        FloatingPointError: every seed has diverged.
    """
    require_packages(OWN[order.task])
    if order.fraction != 1:
        raise ValueError("--fraction takes a part of COCO's images: leave it out for your own photos")
    backbone = load(order.backbone)
    backbone.resnet("Detectron2's Faster R-CNN of the zoo")
    data = read(order.data, cast(CocoTask, order.task))
    gpus = count_gpus(order.gpus) if not dry else order.gpus or 0
    task = with_data(OWN[order.task], data, order.out.resolve() / "data")
    resolved = resolve(task, backbone, order.weights, gpus, order.overrides)
    print("\n".join(said(order, backbone, data, resolved)), flush=True)
    if dry:
        print(resolved.cfg.dump())
        return 0
    config = plain(resolved.cfg, "DATASETS.TRAIN", "DATASETS.TEST")
    facts = {"task": order.task, "config": config, "backbone": backbone.fingerprint, "data": data.found.fingerprint}
    training = Training(order, backbone, resolved, gpus, facts)
    hold(training)
    write(data, order.out / "data")
    if (trained := train_seeds(training, resolved.notes, partial(write_classes, names=data.classes))) is None:
        return STOPPED
    record = summarize(training, data, trained)
    write_record(record, order.out / "results.json")
    figures = ", ".join(f"{name} {value:.1f}" for name, value in record.metrics.items())
    print(f"{order.task} on {data.found.test} images: {figures} -> {order.out / 'results.json'}")
    print(
        f"Detectron2's tools open {order.out / f'seed_{record.seeds[0]}' / CONFIG}; the class names are in {CLASSES} beside it"
    )
    return 0


def with_data(task: Task, data: OwnData, folder: Path) -> Task:
    """A task with the data set, its classes, and a schedule for its number of photos."""
    iterations = min(max(-(-EPOCHS * data.found.train // BATCH), LEAST), MOST)
    changes: dict[str, Any] = {
        "DATASETS.TRAIN": (str(folder / "train.json"),),
        "DATASETS.TEST": (str(folder / "val.json"),),
        "MODEL.ROI_HEADS.NUM_CLASSES": len(data.classes),
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.STEPS": (iterations * 2 // 3, iterations * 8 // 9),
        "SOLVER.WARMUP_ITERS": min(1000, iterations // 10),
        "SOLVER.CHECKPOINT_PERIOD": min(5000, iterations // 10),
    }
    if data.runs:
        changes["INPUT.MASK_FORMAT"] = "bitmask"
    return replace(task, changes=dict(task.changes) | changes)


def said(order: Order, backbone: Weights, data: OwnData, resolved: Resolved) -> list[str]:
    solver, names = resolved.cfg.SOLVER, data.classes
    return [
        f"{order.task} on {backbone.architecture} of {backbone.what}: {data.found.train} photos for training, "
        f"{data.found.test} for scoring, {len(names)} classes ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})",
        *(f"note: {note}" for note in (*backbone.notes, *resolved.notes)),
        f"cost: {order.runs} run{'s' if order.runs > 1 else ''} of {solver.MAX_ITER} iterations of "
        f"{solver.IMS_PER_BATCH} images (SOLVER.MAX_ITER and SOLVER.IMS_PER_BATCH change that)",
    ]


def summarize(training: Training, data: OwnData, trained: Trained) -> Record:
    """The record; a figure without a value in Detectron2 is 0."""
    order, notes = training.order, [*training.resolved.notes, *trained.diverged]
    boxes = next(iter(trained.scores.values())).get("bbox", {})
    items = {name: {"APbb": float(value)} for name in data.classes if (value := boxes.get(f"AP-{name}")) is not None}
    return fine_tuning_record(
        *(order.backbone, training.backbone),
        {seed: metrics(OWN[order.task], left)[0] for seed, left in trained.scores.items()},
        protocol=f"detectron2-{order.task}",
        version=VERSION,
        rule=CHANGED if notes else "own",
        split="val",
        data=Data(order.data.resolve().name, data.found.fingerprint, data.found.test),
        settings=settings(training, data.found.train, notes),
        versions=versions() | installed(),
        seconds=trained.seconds,
        items={"class": items} if items else {},
        absent=data.splits[1].absent,
    )
