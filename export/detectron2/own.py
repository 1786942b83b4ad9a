"""Fine-tuning in Detectron2 on one's own labeled photos: Faster or Mask R-CNN with a feature pyramid.

It is Detectron2's own detector of its model zoo with trained batch norm. No paper has a figure for it.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import yaml

from clove_hub.data.coco import Task as CocoTask
from clove_hub.data.files import Data
from clove_hub.evaluation.result import CHANGED, RANDOM, Record, now, versions, write_text
from clove_hub.evaluation.result import write as write_record
from clove_hub.processes import STOPPED
from clove_hub.weights import Weights, load

from ..convert import write_converted
from ..seeds import SCORES, count_gpus, require_same, run_seeds
from .config import Resolved, resolve
from .facts import CONFIG, write_facts
from .own_data import CLASSES, OwnData, read, write, write_classes
from .suite import SEED_STEP, Order, installed, require_packages, train
from .tasks import BOXES, MASKS, SYNC_BN, Task

VERSION = 1
EPOCHS = 36
"""Over the photos, as in the 3x schedules of Detectron2's zoo."""
LEAST, MOST = 1000, 90000
"""Iterations: enough for a few photos, and no more than COCO's 1x schedule."""
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
    """Trains and scores every seed that is not done, and writes results.json.

    Args:
        order: with the folder of photos as `data`.
        dry: print the config and what is wrong, and train nothing.

    Returns:
        The exit code: 0, or STOPPED after a signal.

    Raises:
        ValueError: something is missing or wrong; found before anything is written.
        ChildProcessError, KeyboardInterrupt: from `train`.
        FloatingPointError: every seed has diverged.
    """
    require_packages(OWN[order.task])
    if order.fraction != 1:
        raise ValueError("--fraction takes a part of COCO's images: leave it out for photos of your own")
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
    config = json.loads(json.dumps(yaml.safe_load(resolved.cfg.dump())))
    for section, key in (("MODEL", "WEIGHTS"), ("DATASETS", "TRAIN"), ("DATASETS", "TEST")):  # of the folder
        del config[section][key]
    del config["OUTPUT_DIR"], config["SEED"]
    facts = {"task": order.task, "config": config, "backbone": backbone.fingerprint, "data": data.found.fingerprint}
    require_same(order.out / "setup.json", facts)

    from .verify import require_held

    write_converted(backbone, "detectron2", order.weights)
    difference = require_held(resolved.cfg, backbone)
    print(f"{order.weights}: every tensor is in its place; feature maps are timm's to {difference:.1g}", flush=True)
    write(data, order.out / "data")
    write_text(order.out / "setup.json", json.dumps(facts, indent=1) + "\n")
    began, before = time.perf_counter(), any(path.is_dir() for path in order.out.glob("seed_*"))

    def train_seed(number: int, folder: Path) -> bool:
        cfg = resolved.cfg.clone()
        cfg.SEED, cfg.OUTPUT_DIR = number * SEED_STEP, str(folder.resolve())
        write_text(folder.with_suffix(".yaml"), cfg.dump())
        write_classes(folder, data.classes)
        write_facts(folder, order.task, backbone, order.fraction, resolved.notes)
        return train(folder.with_suffix(".yaml"), folder, gpus)

    if (trained := run_seeds(order.out, order.runs, train_seed)) is None:
        return STOPPED
    seeds, warnings = trained
    scores = {seed: json.loads((order.out / f"seed_{seed}" / SCORES).read_text(encoding="utf-8")) for seed in seeds}
    seconds = None if before else round(time.perf_counter() - began, 3)
    record = summarize(order, backbone, resolved.cfg.SOLVER, (*resolved.notes, *warnings), facts, data, scores, seconds)
    write_record(record, order.out / "results.json")
    figures = ", ".join(f"{name} {value:.1f}" for name, value in record.metrics.items())
    print(f"{order.task} on {data.found.test} images: {figures} -> {order.out / 'results.json'}")
    print(
        f"Detectron2's tools open {order.out / f'seed_{seeds[0]}' / CONFIG}; the classes' names are in {CLASSES} beside it"
    )
    return 0


def with_data(task: Task, data: OwnData, folder: Path) -> Task:
    """A task with the data set, its classes, and a schedule for so many photos."""
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
        f"{order.task} on {backbone.architecture} of {backbone.what}: {data.found.train} photos to learn from, "
        f"{data.found.test} to score, {len(names)} classes ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})",
        *(f"note: {note}" for note in (*backbone.notes, *resolved.notes)),
        f"cost: {order.runs} run{'s' if order.runs > 1 else ''} of {solver.MAX_ITER} iterations of "
        f"{solver.IMS_PER_BATCH} images (SOLVER.MAX_ITER and SOLVER.IMS_PER_BATCH change that)",
    ]


def summarize(
    order: Order,
    backbone: Weights,
    solver: Any,
    notes: Sequence[str],
    facts: Mapping[str, Any],
    data: OwnData,
    scores: Mapping[int, Mapping[str, Mapping[str, float | None]]],
    seconds: float | None,
) -> Record:
    """Mean and sample standard deviation over the seeds; a figure that Detectron2 gives none is 0."""
    values = {
        ours: [float(each.get(group, {}).get(theirs) or 0.0) for each in scores.values()]
        for group, names in OWN[order.task].metrics.items()
        for theirs, ours in names.items()
    }
    first = next(iter(scores.values()))
    items = {
        name: {"APbb": float(value)}
        for name in data.classes
        if (value := first.get("bbox", {}).get(f"AP-{name}")) is not None
    }
    return Record(
        protocol=f"detectron2-{order.task}",
        version=VERSION,
        rule=CHANGED if notes else "own",
        split="val",
        model=order.backbone,
        architecture=backbone.architecture,
        weights=backbone.fingerprint,
        metrics={name: statistics.fmean(each) for name, each in values.items()},
        deviations={name: statistics.stdev(each) for name, each in values.items() if len(each) > 1},
        seeds=tuple(scores),
        randomness="fine-tuning",
        random_weights=order.backbone.startswith(RANDOM),
        absent=data.splits[1].absent,
        left_out=(),
        data=Data(order.data.resolve().name, data.found.fingerprint, data.found.test),
        settings={
            "engine": "detectron2",
            "steps": solver.MAX_ITER,
            "batch": {"total": solver.IMS_PER_BATCH},
            "train_images": data.found.train,
            "learning_rate": solver.BASE_LR,
            "notes": list(notes),
            "config": hashlib.sha256(json.dumps(facts["config"], sort_keys=True).encode()).hexdigest(),
        },
        preprocessing={"mean": list(backbone.preprocessing.mean), "std": list(backbone.preprocessing.std)},
        items={"class": items} if items else {},
        seconds=seconds,
        versions=versions() | installed(),
        date=now(),
    )
