"""The steps of every training in Detectron2: the papers' tasks (`suite`) and detectors on your own photos (`own`)."""

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
"""Distance of seeds: Detectron2 adds the rank to the seed, and no two processes of two runs must draw the same
numbers."""
SETUP = "setup.json"


@dataclass(frozen=True)
class Training:
    """A task on a backbone, after everything was read and checked."""

    order: Order
    backbone: Weights
    resolved: Resolved
    gpus: int
    facts: Mapping[str, Any]
    """The facts that every resuming call must share with the first, including `config`."""


def require_packages(task: Task) -> None:
    """Raise ValueError naming the packages that are not installed and their install pages."""
    needed = {"detectron2": INSTALL, **task.packages}
    if absent := [name for name in needed if find_spec(name) is None]:
        listed = "; ".join(f"{name}: {needed[name]}" for name in absent)
        raise ValueError(
            f"not installed in this Python: {listed}. (`clove-hub downstream torchvision` needs none of these.)"
        )


def plain(cfg: Any, *paths: str) -> dict[str, Any]:
    """A config without the keys that depend on the folder and the seed, as read back from JSON.

    Args:
        paths: additional keys that depend on the folder, such as `DATASETS.TRAIN`.
    """
    config: dict[str, Any] = json.loads(json.dumps(yaml.safe_load(cfg.dump())))
    for name in ("MODEL.WEIGHTS", "OUTPUT_DIR", "SEED", *paths):
        *sections, key = name.split(".")
        del reduce(getitem, sections, config)[key]
    return config


def hold(training: Training) -> None:
    """Write the converted backbone, after checking that the folder is free or belongs to this training.

    Raises:
        ValueError: the folder holds another training, a tensor is not in place, or a feature map differs from timm's.
    """
    from .verify import require_held

    weights = training.order.weights
    require_same(training.order.out / SETUP, training.facts)
    write_converted(training.backbone, "detectron2", weights)
    difference = require_held(training.resolved.cfg, training.backbone)
    print(
        f"{weights}: every tensor is in its place; feature maps differ from timm's by at most {difference:.1g}",
        flush=True,
    )


def train_seeds(
    training: Training, notes: Sequence[str], beside: Callable[[Path], object] = lambda folder: None
) -> Trained | None:
    """`run_seeds` for a Detectron2 training; from now on the folder belongs to it.

    Args:
        notes: deviations from the protocol.
        beside: writes additional files to a seed's folder.
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
    """Train one seed: `run_seed` for a Detectron2 training.

    Returns:
        Whether it was trained and scored; False after a signal.
    """
    words = ["-m", f"{__package__}.train_net", "--parent", str(os.getpid()), "--config-file", str(config)]
    words += ["--fraction", str(fraction)] if fraction < 1 else []
    return run_seed([*words, "--num-gpus", str(gpus), "--dist-url", "auto"], folder, "log.txt")


def metrics(task: Task, scores: Mapping[str, Mapping[str, float | None]]) -> tuple[dict[str, float], list[str]]:
    """The reported figures, by clove-hub's names, and those that are 0 because the detector found nothing at all.

    For these Detectron2 gives no figure, and DensePose -1. The rehearsal has verified that there are objects to find.
    """
    named = {
        ours: scores.get(group, {}).get(theirs)
        for group, names in task.metrics.items()
        for theirs, ours in names.items()
    }
    nothing = [name for name, value in named.items() if value is None or value < 0]
    return {name: 0.0 if name in nothing else float(value or 0) for name, value in named.items()}, nothing


def settings(training: Training, train_images: int, notes: Sequence[str], **more: Any) -> dict[str, Any]:
    """The settings of the record.

    Args:
        notes: deviations from the protocol.
        more: settings that the config has no keys for.
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
