"""The course of every training in Detectron2: the papers' tasks (`suite`) and detectors on one's own photos (`own`)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import version
from importlib.util import find_spec
from operator import getitem
from pathlib import Path
from typing import Any

import torch
import yaml

from clove_hub.evaluation.result import write_text
from clove_hub.weights import Weights

from ..convert import write_converted
from ..seeds import Trained, require_same, run_seed, run_seeds
from .config import Resolved
from .facts import write_facts
from .tasks import Order, Task

INSTALL = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
SEED_STEP = 1000
"""Detectron2 adds a process's number to the seed; so far apart no two processes of two runs draw the same."""
SETUP = "setup.json"


@dataclass(frozen=True)
class Training:
    """A task on a backbone, once everything is read and fits together."""

    order: Order
    backbone: Weights
    resolved: Resolved
    gpus: int
    facts: Mapping[str, Any]
    """What every call that goes on with it must have in common with the first; `config` is among them."""


def require_packages(task: Task) -> None:
    """Raises ValueError naming what is not installed and where its own install page is."""
    needed = {"detectron2": INSTALL, **task.packages}
    if absent := [name for name in needed if find_spec(name) is None]:
        listed = "; ".join(f"{name}: {needed[name]}" for name in absent)
        raise ValueError(
            f"not installed in this Python: {listed}. (`clove-hub downstream torchvision` needs none of these.)"
        )


def plain(cfg: Any, *paths: str) -> dict[str, Any]:
    """A config without what depends on the folder and the seed, as JSON gives it back.

    Args:
        paths: further keys that depend on the folder, such as `DATASETS.TRAIN`.
    """
    config: dict[str, Any] = json.loads(json.dumps(yaml.safe_load(cfg.dump())))
    for name in ("MODEL.WEIGHTS", "OUTPUT_DIR", "SEED", *paths):
        *sections, key = name.split(".")
        del reduce(getitem, sections, config)[key]
    return config


def hold(training: Training) -> None:
    """Writes the converted backbone, once the folder is known to be free or this training's.

    Raises:
        ValueError: the folder holds another training, a tensor is not in its place, or a feature map is not timm's.
    """
    from .verify import require_held

    weights = training.order.weights
    require_same(training.order.out / SETUP, training.facts)
    write_converted(training.backbone, "detectron2", weights)
    difference = require_held(training.resolved.cfg, training.backbone)
    print(f"{weights}: every tensor is in its place; feature maps are timm's to {difference:.1g}", flush=True)


def train_seeds(
    training: Training, notes: Sequence[str], beside: Callable[[Path], object] = lambda folder: None
) -> Trained | None:
    """`run_seeds` of Detectron2's training; from here on the folder is this training's.

    Args:
        notes: what is not as in the protocol.
        beside: writes what else belongs into a seed's folder.
    """
    order = training.order
    write_text(order.out / SETUP, json.dumps(training.facts, indent=1) + "\n")

    def train_seed(number: int, folder: Path) -> bool:
        cfg = training.resolved.cfg.clone()
        cfg.SEED, cfg.OUTPUT_DIR = number * SEED_STEP, str(folder.resolve())
        write_text(folder.with_suffix(".yaml"), cfg.dump())
        beside(folder)
        write_facts(folder, order.task, training.backbone, order.fraction, notes)
        return train(folder.with_suffix(".yaml"), folder, training.gpus, order.fraction)

    return run_seeds(order.out, order.runs, train_seed)


def train(config: Path, folder: Path, gpus: int, fraction: float = 1.0) -> bool:
    """One seed: `run_seed` of Detectron2's training.

    Returns:
        Whether it was trained and scored; False after a signal.
    """
    words = ["-m", f"{__package__}.train_net", "--parent", str(os.getpid()), "--config-file", str(config)]
    words += ["--fraction", str(fraction)] if fraction < 1 else []
    return run_seed([*words, "--num-gpus", str(gpus), "--dist-url", "auto"], folder, "log.txt")


def metrics(task: Task, scores: Mapping[str, Mapping[str, float | None]]) -> tuple[dict[str, float], list[str]]:
    """The figures that are reported, by our names, and which of them are 0 since the detector found nothing at all.

    To such a one Detectron2 gives no figure, and DensePose -1. That there is something to be found was seen in the rehearsal.
    """
    named = {
        ours: scores.get(group, {}).get(theirs)
        for group, names in task.metrics.items()
        for theirs, ours in names.items()
    }
    nothing = [name for name, value in named.items() if value is None or value < 0]
    return {name: 0.0 if name in nothing else float(value or 0) for name, value in named.items()}, nothing


def settings(training: Training, train_images: int, notes: Sequence[str], **more: Any) -> dict[str, Any]:
    """Those of the record.

    Args:
        notes: what is not as in the protocol.
        more: what the config has no keys for.
    """
    solver, config = training.resolved.cfg.SOLVER, json.dumps(training.facts["config"], sort_keys=True)
    return {
        "engine": "detectron2",
        "steps": solver.MAX_ITER,
        "batch": {"total": solver.IMS_PER_BATCH},
        "train_images": train_images,
        "learning_rate": solver.BASE_LR,
        **more,
        "notes": list(notes),
        "config": hashlib.sha256(config.encode()).hexdigest(),
    }


def installed() -> dict[str, str | None]:
    import detectron2

    return {"detectron2": detectron2.__version__, "torchvision": version("torchvision"), "cuda": torch.version.cuda}
