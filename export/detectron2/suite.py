"""All runs of a task: check everything, convert, train each seed, and write results.json beside the paper's rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from clove_hub.data.files import Data
from clove_hub.evaluation.collected import printed
from clove_hub.evaluation.result import CHANGED, Record, fine_tuning_record, versions, write, write_text
from clove_hub.processes import STOPPED
from clove_hub.weights import Weights, load
from clove_hub.zoo.models import protocols

from ..seeds import SCORES, Found, count_gpus, finished, unlike
from .config import Resolved, resolve
from .facts import how_to_open
from .layouts import PUBLISHED, require_layout
from .runs import Training, hold, installed, metrics, plain, require_packages, settings, train_seeds
from .surface import require_surface
from .tasks import TASKS, Order, Task

log = logging.getLogger(__name__)

VERSION = 1


def rehearse(order: Order) -> str:
    """The resolved config, its cost, and what is missing, without writing anything.

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
    """Train and score every seed that is not done, and write results.json.

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
    facts = {"task": order.task, "config": plain(resolved.cfg), "fraction": order.fraction}
    facts |= {"backbone": backbone.fingerprint, "data": found.fingerprint}
    print("\n".join(_said(order, backbone, resolved)), flush=True)
    training = Training(order, backbone, resolved, gpus, facts)
    hold(training)
    if not all(finished(order.out, number) for number in range(order.runs)):
        from .rehearsal import rehearse_task

        rehearse_task(order.task, task, resolved.cfg, backbone, order.data, order.out, gpus)
    notes = [*resolved.notes, *unlike(found, PUBLISHED[task.layout])]
    if (trained := train_seeds(training, notes)) is None:
        return STOPPED
    notes += trained.diverged
    scores = {}
    for number, left in trained.scores.items():
        scores[number], nothing = metrics(task, left)
        if nothing:
            notes.append(f"seed {number} found nothing, which counts as 0 ({', '.join(nothing)})")
            path = order.out / f"seed_{number}" / SCORES
            log.warning("%s: %s. See %s; a very short or a diverged training causes this", order.out, notes[-1], path)
    record = summarize(training, found, scores, notes, trained.seconds)
    write(record, order.out / "results.json")
    table = beside_the_papers(record)
    write_text(order.out / "table.md", table + "\n")
    opened = how_to_open(order.out / f"seed_{record.seeds[0]}", resolved.cfg.MODEL.ROI_HEADS.NAME, task.densepose)
    print(f"\n{table}\n\n{order.out / 'results.json'}\nTo see its predictions with Detectron2: {opened}")
    return 0


def prepare(order: Order, task: Task, backbone: Weights, gpus: int) -> Resolved:
    """The config for the backbone, after checking that the task supports it.

    Raises:
        ValueError: it does not, or the config is a wrong set-up.
    """
    network = backbone.resnet("Detectron2")
    if order.task.endswith("_c4") and not network.bottleneck:
        raise ValueError(
            f"{order.task} has bottlenecks in its head, but {backbone.architecture} has basic blocks: choose another task"
        )
    if order.fraction < 1 and not task.layout.startswith("coco"):
        raise ValueError(f"--fraction takes a part of COCO's images; {order.task} is not trained on them: leave it out")
    return resolve(task, backbone, order.weights, gpus, order.overrides, order.fraction)


# ---- reports ---------------------------------------------------------------------------------------------------------


def _said(order: Order, backbone: Weights, resolved: Resolved) -> list[str]:
    """The training, with iterations, images, and hours as far as Detectron2 reports them for its own config."""
    protocol, seconds, solver = protocols()[order.task], TASKS[order.task].seconds, resolved.cfg.SOLVER
    images = solver.MAX_ITER * solver.IMS_PER_BATCH
    if seconds is None:
        takes = "Detectron2 reports no time for this config"
    else:
        hours = seconds * images / 16 / 3600
        takes = (
            f"Detectron2 reports {seconds:g} s for 16 images on 8 V100; at this speed a run takes {hours:.1f} hours and all "
            f"runs {hours * order.runs * 8:.0f} GPU hours (more if batch norm is trained)"
        )
    return [
        f"{order.task}: {protocol.name} ({protocol.settings}), on {backbone.architecture} of {backbone.what}",
        *(f"note: {note}" for note in (*backbone.notes, *resolved.notes)),
        f"cost: {order.runs} runs of {solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images, {images} images "
        f"each; {takes}",
    ]


def summarize(
    training: Training,
    found: Found,
    scores: Mapping[int, Mapping[str, float]],
    notes: Sequence[str],
    seconds: float | None,
) -> Record:
    """The record, with the protocol's rule if there is no note about a deviation."""
    order, protocol = training.order, protocols()[training.order.task]
    images = max(round(order.fraction * found.train), 1)
    return fine_tuning_record(
        *(order.backbone, training.backbone, scores),
        protocol=order.task,
        version=VERSION,
        rule=CHANGED if notes else protocol.rule,
        split=protocol.split,
        data=Data(protocol.dataset, found.fingerprint, found.test),
        settings=settings(training, images, notes, fraction=order.fraction, gpus=training.gpus),
        versions=versions() | installed(),
        seconds=seconds,
    )


def beside_the_papers(record: Record) -> str:
    """A Markdown table: this result, the papers' models and their baselines under the same protocol."""
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
