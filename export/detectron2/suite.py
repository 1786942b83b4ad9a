"""All runs of a task: check everything, convert, train each seed, and write results.json beside the paper's rows."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from clove_hub.data.files import Data
from clove_hub.evaluation.collected import printed
from clove_hub.evaluation.result import CHANGED, Record, now, versions, write, write_text
from clove_hub.processes import STOPPED
from clove_hub.weights import Weights, load
from clove_hub.zoo.models import protocols

from ..convert import write_converted
from ..seeds import SCORES, Found, count_gpus, finished, require_same, run_seed, run_seeds, unlike
from .config import Resolved, resolve
from .facts import how_to_open, write_facts
from .layouts import PUBLISHED, require_layout
from .surface import require_surface
from .tasks import TASKS, Task

log = logging.getLogger(__name__)

VERSION = 1
INSTALL = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
TRAIN_NET = f"{__package__}.train_net"
SEED_STEP = 1000
"""Detectron2 adds a process's number to the seed; so far apart no two processes of two runs draw the same."""


@dataclass(frozen=True)
class Order:
    """What was asked for."""

    task: str
    backbone: str
    data: Path
    """Detectron2's DETECTRON2_DATASETS."""
    out: Path
    gpus: int | None
    """None for all that PyTorch sees."""
    runs: int
    overrides: tuple[str, ...]
    fraction: float

    @property
    def weights(self) -> Path:
        return self.out / "backbone.pth"


def rehearse(order: Order) -> str:
    """The resolved config, what it would cost, and what is missing, without writing anything.

    Raises:
        ValueError: Detectron2 is missing, or the set-up is wrong.
    """
    task = TASKS[order.task]
    require_packages(task)
    missing = []
    checks: list[Callable[[], object]] = [
        lambda: require_layout(task.layout, order.data),
        lambda: count_gpus(order.gpus),
    ]
    if task.densepose:
        checks.append(lambda: require_surface(fetch=False))
    for check in checks:
        try:
            check()
        except ValueError as error:
            missing.append(f"missing: {error}")
    backbone = load(order.backbone)
    gpus = order.gpus if order.gpus is not None else torch.cuda.device_count() or 8
    resolved = prepare(order, task, backbone, gpus)
    return "\n".join([resolved.cfg.dump(), *_said(order, backbone, resolved), *missing])


def run(order: Order) -> int:
    """Trains and scores every seed that is not done, and writes results.json.

    Returns:
        The exit code: 0, or STOPPED after a signal.

    Raises:
        ValueError: something is missing or wrong; found before anything is written.
        ChildProcessError, KeyboardInterrupt: from `train`.
        FloatingPointError: every seed has diverged.
    """
    task = TASKS[order.task]
    require_packages(task)
    found = require_layout(task.layout, order.data)
    if task.densepose:
        require_surface(fetch=True)
    gpus = count_gpus(order.gpus)
    backbone = load(order.backbone)
    resolved = prepare(order, task, backbone, gpus)
    config = json.loads(json.dumps(yaml.safe_load(resolved.cfg.dump())))  # as JSON gives it back
    del config["MODEL"]["WEIGHTS"], config["OUTPUT_DIR"], config["SEED"]  # of the folder and the seeds
    facts = {"task": order.task, "config": config, "fraction": order.fraction}
    facts |= {"backbone": backbone.fingerprint, "data": found.fingerprint}
    require_same(order.out / "setup.json", facts)
    print("\n".join(_said(order, backbone, resolved)), flush=True)

    from .rehearsal import rehearse_task
    from .verify import require_held

    write_converted(backbone, "detectron2", order.weights)
    difference = require_held(resolved.cfg, backbone)
    print(f"{order.weights}: every tensor is in its place; feature maps are timm's to {difference:.1g}", flush=True)
    if not all(finished(order.out, number) for number in range(order.runs)):
        rehearse_task(order.task, task, resolved.cfg, backbone, order.data, order.out, gpus)
    write_text(order.out / "setup.json", json.dumps(facts, indent=1) + "\n")
    notes = (*resolved.notes, *unlike(found, PUBLISHED[task.layout]))

    def train_seed(number: int, folder: Path) -> bool:
        cfg = resolved.cfg.clone()
        cfg.SEED, cfg.OUTPUT_DIR = number * SEED_STEP, str(folder.resolve())
        write_text(folder.with_suffix(".yaml"), cfg.dump())
        write_facts(folder, order.task, backbone, order.fraction, notes)
        return train(folder.with_suffix(".yaml"), folder, gpus, order.fraction)

    began, before = time.perf_counter(), [path for path in order.out.glob("seed_*") if path.is_dir()]
    if (trained := run_seeds(order.out, order.runs, train_seed)) is None:
        return STOPPED
    seeds, warnings = trained
    scores = {}
    for number in seeds:
        path = order.out / f"seed_{number}" / SCORES
        scores[number], nothing = metrics(task, json.loads(path.read_text(encoding="utf-8")))
        if nothing:
            warnings.append(f"seed {number} found nothing, which counts as 0 ({', '.join(nothing)})")
            log.warning(
                "%s: %s. See %s; too short a training does this, or a diverged one", order.out, warnings[-1], path
            )
    seconds = None if before else round(time.perf_counter() - began, 3)  # of earlier calls it is not known
    record = summarize(order, backbone, resolved.cfg.SOLVER, (*notes, *warnings), facts, found, scores, gpus, seconds)
    write(record, order.out / "results.json")
    table = beside_the_papers(record)
    write_text(order.out / "table.md", table + "\n")
    opened = how_to_open(order.out / f"seed_{seeds[0]}", resolved.cfg.MODEL.ROI_HEADS.NAME, task.densepose)
    print(f"\n{table}\n\n{order.out / 'results.json'}\nDetectron2 opens what was trained: {opened}")
    return 0


def train(config: Path, folder: Path, gpus: int, fraction: float = 1.0) -> bool:
    """One seed: `run_seed` of Detectron2's training.

    Returns:
        Whether it was trained and scored; False after a signal.
    """
    options = f"--num-gpus {gpus} --dist-url auto".split()
    words = ["-m", TRAIN_NET, "--parent", str(os.getpid()), "--config-file", str(config)]
    if fraction < 1:
        words += ["--fraction", str(fraction)]
    return run_seed([*words, *options], folder, "log.txt")


# ---- what must be there ----------------------------------------------------------------------------------------------


def require_packages(task: Task) -> None:
    """Raises ValueError naming what is not installed and where its own install page is."""
    needed = {"detectron2": INSTALL, **task.packages}
    if absent := [name for name in needed if find_spec(name) is None]:
        listed = "; ".join(f"{name}: {needed[name]}" for name in absent)
        raise ValueError(
            f"not installed in this Python: {listed}. (`clove-hub downstream torchvision` needs none of these.)"
        )


def prepare(order: Order, task: Task, backbone: Weights, gpus: int) -> Resolved:
    """The config for the backbone, once it is known to be one that the task can have.

    Raises:
        ValueError: it is not, or the config is a wrong set-up.
    """
    network = backbone.resnet("Detectron2")
    if order.task.endswith("_c4") and not network.bottleneck:
        raise ValueError(f"{order.task} has bottlenecks in its head, but {backbone.architecture} has basic blocks")
    if order.fraction < 1 and not task.layout.startswith("coco"):
        raise ValueError(f"--fraction takes a part of COCO's images; {order.task} is not trained on them")
    return resolve(task, backbone, order.weights, gpus, order.overrides, order.fraction)


# ---- what is said ----------------------------------------------------------------------------------------------------


def _said(order: Order, backbone: Weights, resolved: Resolved) -> list[str]:
    """What is trained, and iterations, images, and hours as far as Detectron2 reports them for its own config."""
    protocol, seconds, solver = protocols()[order.task], TASKS[order.task].seconds, resolved.cfg.SOLVER
    images = solver.MAX_ITER * solver.IMS_PER_BATCH
    if seconds is None:
        takes = "Detectron2 reports no time for this config"
    else:
        hours = seconds * images / 16 / 3600
        takes = (
            f"Detectron2 reports {seconds:g} s for 16 images on 8 V100, at which a run takes {hours:.1f} hours and all "
            f"take {hours * order.runs * 8:.0f} GPU hours (batch norm that is trained adds to it)"
        )
    return [
        f"{order.task}: {protocol.name} ({protocol.settings}), on {backbone.architecture} of {backbone.what}",
        *(f"note: {note}" for note in (*backbone.notes, *resolved.notes)),
        f"cost: {order.runs} runs of {solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images, {images} images "
        f"each; {takes}",
    ]


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


def summarize(
    order: Order,
    backbone: Weights,
    solver: Any,
    notes: Sequence[str],
    facts: Mapping[str, Any],
    found: Found,
    scores: Mapping[int, Mapping[str, float]],
    gpus: int,
    seconds: float | None,
) -> Record:
    """Mean and sample standard deviation over the seeds.

    Args:
        solver: the config's SOLVER.
        notes: what is not as in the protocol.
    """
    values = {name: [each[name] for each in scores.values()] for name in next(iter(scores.values()))}
    protocol = protocols()[order.task]
    return Record(
        protocol=order.task,
        version=VERSION,
        rule=CHANGED if notes else protocol.rule,
        split=protocol.split,
        model=order.backbone,
        architecture=backbone.architecture,
        weights=facts["backbone"],
        metrics={name: statistics.fmean(each) for name, each in values.items()},
        deviations={name: statistics.stdev(each) for name, each in values.items() if len(each) > 1},
        seeds=tuple(scores),
        randomness="fine-tuning",
        random_weights=False,  # one draw of weights for all seeds
        absent=(),
        left_out=(),
        data=Data(protocol.dataset, found.fingerprint, found.test),
        settings={
            "engine": "detectron2",
            "steps": solver.MAX_ITER,
            "batch": {"total": solver.IMS_PER_BATCH},
            "train_images": max(round(order.fraction * found.train), 1),
            "learning_rate": solver.BASE_LR,
            "fraction": order.fraction,
            "gpus": gpus,
            "notes": list(notes),
            "config": hashlib.sha256(json.dumps(facts["config"], sort_keys=True).encode()).hexdigest(),
        },
        preprocessing={"mean": list(backbone.preprocessing.mean), "std": list(backbone.preprocessing.std)},
        items={},
        seconds=seconds,
        versions=versions() | installed(),
        date=now(),
    )


def installed() -> dict[str, str | None]:
    import detectron2

    return {"detectron2": detectron2.__version__, "torchvision": version("torchvision"), "cuda": torch.version.cuda}


def beside_the_papers(record: Record) -> str:
    """A table: this result, the papers' models and their baselines under the same protocol. Markdown."""
    protocol, count = protocols()[record.protocol], len(record.seeds)
    rows = [(f"{record.model}, {count} seed{'s' if count != 1 else ''}", record.metrics), *printed(protocol)]
    names = list(dict.fromkeys(name for _, figures in rows for name in figures))
    cells = [
        [title.replace("|", "\\|"), *(f"{figures[name]:.1f}" if name in figures else "-" for name in names)]
        for title, figures in rows
    ]
    for column, name in enumerate(names, start=1):
        if name in record.deviations:
            cells[0][column] += f" ± {record.deviations[name]:.1f}"
    lines = [f"### {protocol.name}", "", f"{protocol.dataset} {protocol.split}. {protocol.settings}.", ""]
    lines += [f"| {' | '.join(row)} |" for row in [["backbone", *names], ["---"] * (len(names) + 1), *cells]]
    if notes := record.settings["notes"]:
        lines += ["", "Not as in the protocol: " + "; ".join(notes) + "."]
    return "\n".join(lines)
