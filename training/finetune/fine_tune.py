"""One fine-tuning run, from data and backbone to results.json: check, build, train, score, draw."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn

from clove_hub.data import coco
from clove_hub.data.masks import VOID
from clove_hub.evaluation.processes import gather, share
from clove_hub.evaluation.result import CHANGED, Items, by_class, fine_tuning_record, versions, write
from clove_hub.evaluation.scores import absent_classes, class_scores, confusion, segmentation_scores
from clove_hub.runs import read_rows, write_whole
from clove_hub.settings import flat
from clove_hub.weights import Weights, load
from clove_hub.weights.bundle import CONFIG

from ..run.changes import changes_of
from ..run.device import make_accelerator, synchronized
from ..run.folder import RunFolder
from ..run.loader import explained
from ..run.peers import Peers, named
from ..run.sampler import divide_batch
from ..run.stopping import FINISHED, Stop, StopRequests, never, until_stopped
from . import classes, scores
from . import drawing as pictures
from .best import ROWS, best
from .crops import bicubic, nearest
from .dataset import DetectionDataset, Sample, SegmentationDataset
from .detector import config_of
from .loop import Job, bar, make_precise, on_device, train
from .networks import build, misplaced
from .schedule import Plan, plan
from .settings import AMENDABLE, FinetuneSettings, Task, as_sections, differences, rule
from .splits import TaskData, load_data, require_sound

log = logging.getLogger(__name__)

VERSIONS: dict[Task, int] = {"detection": 2, "instances": 2, "keypoints": 2, "segmentation": 3}
"""Version of each task's rule, incremented when the same settings no longer give the same figure."""
METRIC: dict[Task, str] = {"detection": "APbb", "instances": "APmk", "keypoints": "APkp", "segmentation": "mIoU"}
"""The figure that decides which network is best."""
DRAWN = 0.5
"""Minimum score of drawn detections."""


class Scored(NamedTuple):
    metrics: dict[str, float]
    items: Items
    """The figures of each class."""
    absent: tuple[str, ...]
    """Classes without an image."""
    confusion: Tensor
    """Confusion of pixels (K, K), or of objects (K + 1, K + 1), where the last is the background."""


def run(settings: FinetuneSettings, backbone: str, data: Path, out: Path, stop_requests: StopRequests = never) -> int:
    """Fine-tune, score and draw; return the exit code: FINISHED, STOPPED or INTERRUPTED.

    Args:
        stop_requests: `listen` if signals stop the run, as for a command.

    Raises:
        ValueError: wrong input, found before the first step.
        FloatingPointError: a non-finite loss or gradient.
        OSError: a file of the run cannot be written, a data-loading worker or another process of the run has ended.
    """
    if settings.run.precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError("run.precision=fp16 needs an accelerator: choose bf16 or fp32 on a CPU")
    accelerator = make_accelerator(settings.run.precision, settings.run.timeout)
    peers = Peers(settings.run.timeout)

    # ---- data and backbone -------------------------------------------------------------------------------------
    with peers.together():
        divide_batch(settings.batch.total, settings.batch.total, peers.world)  # raises if it is not divisible
        if not data.is_dir():
            raise ValueError(f"--data {data} is not a folder")
        source = load(backbone, seed=settings.run.seed)
        if (bands := len(source.preprocessing.mean)) != 3:
            raise ValueError(f"{source.what} takes images of {bands} bands, but fine-tuning reads photos, which have 3")
        loaded = load_data(settings, data, source.preprocessing.mean)
        schedule = plan(settings, len(loaded.train))
    for note in source.notes:
        log.warning("%s", note)
    identity = {
        "backbone": source.fingerprint,
        "normalization": source.preprocessing.normalization,
        "data": loaded.fingerprint,
    }
    facts: dict[str, Any] = {"settings": as_sections(settings), **identity}
    peers.require_same(flat(facts))
    with RunFolder(out, peers, settings.run.keep, "--out", ("step", "files", *facts)) as folder:
        found = folder.found[1] if folder.found else None
        with peers.together():
            if found:
                foreign = differences(found["settings"], facts["settings"], AMENDABLE)
                foreign += [f"another {key}" for key in identity if found[key] != facts[key]]
                changed = list(dict.fromkeys([*foreign, *differences(found["settings"], facts["settings"])]))
                facts["changes"] = changes_of(
                    *(out, found, changed, foreign),
                    amend=settings.run.amend,
                    steps=schedule.steps,
                    option="--out",
                )
        if peers.from_main(found and found["step"] >= schedule.steps and (out / "results.json").is_file()):
            log.info("%s is finished (%d steps); nothing to do", out, schedule.steps)
            return FINISHED
        with named(), explained():
            return fine_tune(*(settings, backbone, source, loaded, schedule, facts, folder, accelerator, stop_requests))


def fine_tune(
    settings: FinetuneSettings,
    backbone: str,
    source: Weights,
    loaded: TaskData,
    schedule: Plan,
    facts: Mapping[str, Any],
    folder: RunFolder,
    accelerator: Accelerator,
    stop_requests: StopRequests,
) -> int:
    """`run` after all input was read and the folder was claimed."""
    out, peers = folder.path, folder.peers
    require_sound(folder, loaded, accelerator, settings.data.workers)
    torch.manual_seed(settings.run.seed)
    network = build(source, settings, loaded.classes, loaded.keypoints)
    assert not (wrong := misplaced(network, source)), f"not in their place: {wrong}"
    folder.write_text("settings.yaml", yaml.safe_dump(as_sections(settings), sort_keys=False))
    images = {"fraction": settings.data.fraction, "list_seed": settings.data.list_seed, "images": loaded.chosen}
    folder.write_text("train_images.json", json.dumps(images) + "\n")
    log.info(
        "%s: %s on %s (%s), all tensors of the backbone loaded; %d images, %d steps of %d (%.3g epochs)",
        *(out, settings.task, source.architecture, source.what, len(loaded.train), schedule.steps),
        *(settings.batch.total, schedule.steps * settings.batch.total / len(loaded.train)),
    )
    if schedule.scaled:
        log.info("%s", schedule.scaled)
    network = synchronized(network, accelerator)

    # ---- training ----------------------------------------------------------------------------------------------
    began = time.perf_counter()
    with stop_requests() as asked_to_stop:
        by_view = schedule.epoch is not None
        job = Job(
            *(folder, settings, schedule, loaded.train, facts),
            metric=METRIC[settings.task],
            score=lambda one: evaluate(one, loaded, settings, accelerator, asked_to_stop, by_view=by_view).metrics,
        )
        if code := train(job, network, accelerator, asked_to_stop):
            return code
        if settings.run.precise_bn:
            make_precise(job, network, accelerator, asked_to_stop)
        found = evaluate(network.eval(), loaded, settings, accelerator, asked_to_stop)

    # ---- scores and pictures -----------------------------------------------------------------------------------
    metrics, items, absent = found.metrics, found.items, found.absent
    seconds = round(time.perf_counter() - began, 3)
    if absent:
        log.warning("classes without a validation image, which the scores do not cover: %s", ", ".join(absent))
    folder.write_tensors("model.safetensors", network.state_dict())
    with peers.together():
        if peers.main:
            draw(network, loaded, settings, accelerator.device, out / "pictures")
            table = classes.rows_of(items.get("class", {}), loaded.counts(found.confusion))
            write_whole(out / "classes.csv", classes.as_csv(table))
            last = [] if settings.task == "segmentation" else [classes.BACKGROUND]
            classes.draw_confusion(found.confusion, [*loaded.names, *last], out / "confusion.png")
            detectors = [] if settings.task == "segmentation" else ["pycocotools", scores.package()]
            changes = {"changes": facts["changes"]} if facts.get("changes") else {}
            step = best(read_rows(out / ROWS), METRIC[settings.task])["step"] if schedule.evaluate else schedule.steps
            record = fine_tuning_record(
                *(backbone, source, {settings.run.seed: metrics}),
                protocol=f"torchvision-{settings.task}",
                version=VERSIONS[settings.task],
                rule=CHANGED if changes else rule(settings),
                split=settings.data.test,
                data=loaded.scored,
                settings=as_sections(settings)
                | {"steps": schedule.steps, "scored_step": step, "train_images": len(loaded.train)}
                | changes,
                versions=versions("torchvision", "accelerate", *detectors),
                seconds=None if folder.found else seconds,  # what was trained before a stop is not known
                items=items,
                absent=absent,
            )
            config = config_of(settings, source, loaded.truth, out / "model.safetensors")
            write_whole(out / CONFIG, json.dumps(config, indent=1, ensure_ascii=False) + "\n")
            write(record, out / "results.json")
            log.info("each class, as in %s:\n%s", out / "classes.csv", classes.as_text(table))
            said = ", ".join(f"{name} {value:.1f}" for name, value in metrics.items())
            log.info("%s on %d images: %s -> %s", settings.task, len(loaded.test), said, out / "results.json")
    return FINISHED


# ---- scores and pictures ---------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    network: nn.Module,
    loaded: TaskData,
    settings: FinetuneSettings,
    accelerator: Accelerator,
    asked_to_stop: Stop,
    by_view: bool = False,
) -> Scored:
    """The metrics of all test images, uncropped and in float32.

    The images are divided among the processes; all processes get all metrics.

    Args:
        by_view: for segmentation, whether pixels are counted at the size of the network's input; otherwise the mask's.

    Raises:
        ValueError: a test image or mask cannot be read, or no pixel has a class.
        SystemExit: as `until_stopped`.
    """
    test, truth = loaded.test, loaded.truth
    outputs = until_stopped(found_in(network, test, accelerator), asked_to_stop)
    if isinstance(test, SegmentationDataset):
        counted = (counts(found, sample.target["classes"], loaded.classes, by_view) for _, sample, found in outputs)
        matrix = torch.stack(gather(counted)).sum(0)
        if not int(matrix.sum()):
            raise ValueError(f"the masks of {settings.data.test} are all void ({VOID}): there is nothing to score")
        names = test.part.classes
        metrics = segmentation_scores(matrix, settings.data.absent_as_zero)
        return Scored(metrics, {"class": class_scores(matrix, names)}, absent_classes(matrix, names), matrix)
    assert isinstance(truth, coco.CocoSplit)
    ids = [photo.id for photo in test.photos]
    matrix = torch.zeros(loaded.classes + 1, loaded.classes + 1, dtype=torch.int64)

    def results_of() -> Iterator[list[dict[str, Any]]]:
        for index, sample, found in outputs:
            matrix.add_(classes.matched(found, sample.target, loaded.classes, DRAWN))
            yield scores.as_results(ids[index], found, truth.categories)

    results = [row for rows in gather(results_of()) for row in rows]
    matrix = torch.stack(gather([matrix])).sum(0)
    metrics, items = by_class(scores.average_precision(truth.truth, results, scores.KINDS[settings.task], ids))
    return Scored(metrics, items, loaded.without_object, matrix)


def counts(found: Tensor, mask: Tensor, classes: int, by_view: bool = False) -> Tensor:
    """`confusion` of an image, whose mask may differ in size from the network's input.

    Args:
        found: scores (classes, h, w).
        mask: (H, W).
        by_view: as in `evaluate`.
    """
    predicted = found.argmax(0).cpu()
    if by_view:
        mask = nearest(mask, found.shape[1:])
    return confusion(nearest(predicted, mask.shape), mask, classes)


def found_in(
    network: nn.Module, test: DetectionDataset | SegmentationDataset, accelerator: Accelerator
) -> Iterator[tuple[int, Sample, Any]]:
    """This process's share of the test images: index, sample, and the network's output."""
    for index in bar(share(range(len(test))), "evaluation", accelerator):
        sample = test[0, index]
        images, _ = on_device([sample], accelerator.device)
        yield index, sample, network(images)[0]


@torch.no_grad()
def draw(network: nn.Module, loaded: TaskData, settings: FinetuneSettings, device: torch.device, folder: Path) -> None:
    """The first test images with the annotations on the left and the predictions on the right."""
    for index in range(min(settings.run.pictures, len(loaded.test))):
        sample = loaded.test[0, index]
        images, targets = on_device([sample], device)
        found = network(images)[0]
        if isinstance(loaded.test, SegmentationDataset):
            mask = targets[0]["classes"]
            image, predicted = bicubic(sample.image, mask.shape), nearest(found.argmax(0).to(torch.uint8), mask.shape)
            left, right = (pictures.draw_classes(image, one) for one in (mask, predicted))
            seen = {
                number for one in (mask, predicted) for number in set(one.flatten().tolist()) if number < loaded.classes
            }
            name = loaded.test.part.name(loaded.test.part.pairs[index])
        else:
            truth = loaded.truth
            assert isinstance(truth, coco.CocoSplit)
            left = pictures.draw_found(sample.image, targets[0], truth.categories, DRAWN)
            right = pictures.draw_found(sample.image, found, truth.categories, DRAWN)
            shown = found["labels"][found["scores"] >= DRAWN]
            seen = {number for one in (targets[0]["labels"], shown) for number in one.tolist()}
            name = loaded.test.photos[index].path.stem
        first = 0 if isinstance(loaded.test, SegmentationDataset) else 1
        legend = {loaded.names[number - first]: pictures.palette(number) for number in sorted(seen)}
        pictures.save_beside(folder / f"{name}.jpg", ("annotations", "predictions"), (left, right), legend)
