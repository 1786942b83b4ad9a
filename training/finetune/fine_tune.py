"""One fine-tuning run, from data and backbone to results.json: check, build, train, score, draw."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from clove_hub.check import Images, check
from clove_hub.data import coco
from clove_hub.data.files import Data, chosen, spread
from clove_hub.data.masks import VOID, Segmented, open_segmented, training_split
from clove_hub.data.voc import read_splits
from clove_hub.evaluation.processes import gather, share
from clove_hub.evaluation.result import RANDOM, Items, Record, by_class, now, versions, write
from clove_hub.evaluation.scores import absent_classes, class_scores, confusion, segmentation_scores
from clove_hub.runs import another_run, newest_checkpoint
from clove_hub.weights import load

from ..run.device import make_accelerator, synchronized
from ..run.sampler import divide_batch
from ..run.stopping import FINISHED, STOPPED
from . import drawing as pictures
from . import scores
from .dataset import DetectionDataset, Sample, SegmentationDataset, mirror_partners
from .loop import Job, bar, make_precise, on_device, train
from .networks import build, misplaced
from .schedule import plan
from .settings import FinetuneSettings, SegmentationImages, Task, as_sections, differences, rule

log = logging.getLogger(__name__)

VERSIONS: dict[Task, int] = {"detection": 1, "instances": 1, "keypoints": 1, "segmentation": 2}
"""Of each task's rule. One goes up when the same settings no longer give the same number."""
DONE = "checked.json"
"""What says, in a run's folder, for which data all images were found sound."""
DRAWN = 0.5
"""The score from which on a detection is drawn."""


@dataclass(frozen=True)
class TaskData:
    """The data of a task, both splits, checked."""

    train: DetectionDataset | SegmentationDataset
    test: DetectionDataset | SegmentationDataset
    chosen: list[int] | list[str]
    """The training images that the limits of `data` have left, before those without an instance were left out."""
    truth: coco.CocoSplit | Segmented
    """The split that is scored."""
    fingerprint: str

    @property
    def classes(self) -> int:
        """Without the background for detectors."""
        return len(self.truth.classes if isinstance(self.truth, Segmented) else self.truth.categories)

    @property
    def keypoints(self) -> int:
        """Of each person; 0 where the task has none."""
        return 0 if isinstance(self.truth, Segmented) else len(self.truth.categories[0].keypoints)


def run(settings: FinetuneSettings, backbone: str, data: Path, out: Path) -> int:
    """Fine-tunes, scores, draws; returns FINISHED or STOPPED.

    Raises:
        ValueError: wrong input, found before the first step.
        FloatingPointError: the loss was not finite.
    """
    accelerator = make_accelerator(settings.run.precision)
    divide_batch(settings.batch.total, settings.batch.total, accelerator.num_processes)  # which may refuse

    # ---- data, backbone, network -------------------------------------------------------------------------------
    if not data.is_dir():
        raise ValueError(f"--data {data} is not a folder")
    source = load(backbone, seed=settings.run.seed)
    loaded = load_data(settings, data, source.preprocessing.mean)
    for note in source.notes:
        log.warning("%s", note)
    schedule = plan(settings, len(loaded.train))
    facts: dict[str, Any] = {
        "settings": as_sections(settings),
        "backbone": source.fingerprint,
        "normalization": {"mean": list(source.preprocessing.mean), "std": list(source.preprocessing.std)},
        "data": loaded.fingerprint,
    }
    found = newest_checkpoint(out, ("step", "files", *facts))
    if found:
        changed = differences(found[1]["settings"], facts["settings"])
        changed += [f"another {key}" for key in ("backbone", "normalization", "data") if found[1][key] != facts[key]]
        if changed:
            raise ValueError(another_run(out, changed, "--out"))
    if found and (out / "results.json").is_file():
        log.info("%s is finished (%d steps); nothing to do", out, found[1]["step"])
        return FINISHED
    command = f"clove-hub check {shlex.quote(str(data))} --task {settings.task}"
    checkable = [part.checkable for part in (loaded.train, loaded.test)]
    require_sound(out, loaded.fingerprint, checkable, accelerator, settings.data.workers, command)
    torch.manual_seed(settings.run.seed)
    network = build(source, settings, loaded.classes, loaded.keypoints)
    assert not (wrong := misplaced(network, source)), f"not in their place: {wrong}"
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        (out / "settings.yaml").write_text(yaml.safe_dump(as_sections(settings), sort_keys=False), encoding="utf-8")
        images = {"fraction": settings.data.fraction, "list_seed": settings.data.list_seed, "images": loaded.chosen}
        (out / "train_images.json").write_text(json.dumps(images) + "\n", encoding="utf-8")
    log.info(
        "%s: %s on %s (%s), every tensor of the backbone in its place; %d images, %d steps of %d (%.3g epochs)",
        *(out, settings.task, source.architecture, source.what, len(loaded.train), schedule.steps),
        *(settings.batch.total, schedule.steps * settings.batch.total / len(loaded.train)),
    )
    if schedule.scaled:
        log.info("%s", schedule.scaled)
    network = synchronized(network, accelerator)

    # ---- training ----------------------------------------------------------------------------------------------
    job = Job(out, settings, schedule, loaded.train, facts)
    began = time.perf_counter()
    done = found[1]["step"] if found else 0
    if found and done == schedule.steps:  # stopped between training and scoring
        network.load_state_dict(load_file(found[0] / "model.safetensors"))
        network.to(accelerator.device)
    elif not train(job, network, accelerator, (found[0], done) if found else None):
        return STOPPED
    if settings.run.precise_bn:
        make_precise(job, network, accelerator)

    # ---- scores and pictures -----------------------------------------------------------------------------------
    metrics, items, absent = evaluate(network.eval(), loaded, settings, accelerator)
    seconds = round(time.perf_counter() - began, 3)
    if absent:
        log.warning("classes that no validation image has, and that the scores say nothing of: %s", ", ".join(absent))
    if accelerator.is_main_process:
        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, out / "model.safetensors")
        draw(network, loaded, settings, accelerator.device, out / "pictures")
        packages = ["torchvision", "accelerate", *([] if settings.task == "segmentation" else ["pycocotools"])]
        samples = len(loaded.test)
        record = Record(
            protocol=f"torchvision-{settings.task}",
            version=VERSIONS[settings.task],
            rule=rule(settings),
            split=settings.data.test,
            model=backbone,
            architecture=source.architecture,
            weights=facts["backbone"],
            metrics=metrics,
            deviations={},
            seeds=(settings.run.seed,),
            randomness="fine-tuning",
            random_weights=backbone.startswith(RANDOM),
            absent=absent,
            left_out=(),
            data=Data(data.resolve().name, loaded.fingerprint, samples),
            settings=as_sections(settings) | {"steps": schedule.steps, "train_images": len(loaded.train)},
            preprocessing=facts["normalization"],
            items=items,
            seconds=None if done else seconds,  # what was trained before a stop is not known
            versions=versions() | {name: version(name) for name in packages},
            date=now(),
        )
        write(record, out / "results.json")
        said = ", ".join(f"{name} {value:.1f}" for name, value in metrics.items())
        log.info("%s on %d images: %s -> %s", settings.task, samples, said, out / "results.json")
    accelerator.wait_for_everyone()
    return FINISHED


# ---- data -------------------------------------------------------------------------------------------------------------


def require_sound(
    out: Path, fingerprint: str, parts: Sequence[Images], accelerator: Accelerator, workers: int, command: str
) -> None:
    """Checks all images, shared among the processes, unless the run's folder says that this was done.

    Args:
        fingerprint: of the data.
        command: that lists all that is bad, for the message.

    Raises:
        ValueError: some are bad; all processes raise it.
    """
    done_file = out / DONE
    try:
        if json.loads(done_file.read_text(encoding="utf-8")) == {"data": fingerprint}:
            return
    except (OSError, ValueError):
        pass
    bad: list[str] = []
    count = 0
    for images in parts:
        own = share(range(len(images.paths)))
        found = gather(bar(check(images, own, workers), "checking the images", accelerator, len(own)))
        bad += [f"{one.name}: {one.problem}" for one in found if one.problem]
        count += len(found)
    if bad:
        raise ValueError(
            f"{len(bad)} of {count} images cannot be used: {'; '.join(bad[:3])}{'; ...' if len(bad) > 3 else ''}. "
            f"`{command}` lists all; mend them, or take them out of the data set"
        )
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        done_file.write_text(json.dumps({"data": fingerprint}) + "\n", encoding="utf-8")
        log.info("all %d images can be read and fit their annotations", count)
    accelerator.wait_for_everyone()


def load_data(settings: FinetuneSettings, folder: Path, mean: Sequence[float]) -> TaskData:
    """Reads and checks both splits.

    Args:
        mean: of the backbone's images, whose color surrounds an image that is smaller than its crop.

    Raises:
        ValueError: the folder is not in the task's layout, or the splits do not fit together.
    """
    few, seed = settings.data, settings.run.seed
    if settings.task == "segmentation":
        assert isinstance(settings.images, SegmentationImages)
        red, green, blue = (round(255 * value) for value in mean)
        train = open_segmented(folder, few.train or training_split(folder)).spread(few.train_images)
        test = open_segmented(folder, few.test).spread(few.test_images)
        by_name = {train.name(pair): pair for pair in train.pairs}
        names = chosen(list(by_name), few.fraction, few.list_seed)
        few_pairs = replace(train, pairs=[by_name[name] for name in names])
        return TaskData(
            SegmentationDataset(few_pairs, settings.images, (red, green, blue), seed),
            SegmentationDataset(test, settings.images, (red, green, blue)),
            names,
            test,
            hashlib.sha256(f"{train.fingerprint}{test.fingerprint}".encode()).hexdigest(),
        )
    photos, truth = read_splits(folder, settings.task, few.train or "train", few.test)
    limited = spread(photos.photos, few.train_images)
    ids = chosen([photo.id for photo in limited], few.fraction, few.list_seed)
    wanted = set(ids)
    partners = mirror_partners(photos.categories[0].keypoints)
    usable = [photo for photo in coco.trainable(photos, settings.task) if photo.id in wanted]
    if not usable:
        raise ValueError(
            f"data.fraction={few.fraction:g} leaves {len(ids)} images of {photos.path}, none with a usable annotation: "
            "raise it"
        )
    return TaskData(
        DetectionDataset(usable, seed, partners),
        DetectionDataset(spread(truth.photos, few.test_images), None, partners),
        ids,
        truth,
        hashlib.sha256(f"{photos.fingerprint}{truth.fingerprint}".encode()).hexdigest(),
    )


# ---- scores and pictures ---------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    network: nn.Module, loaded: TaskData, settings: FinetuneSettings, accelerator: Accelerator
) -> tuple[dict[str, float], Items, tuple[str, ...]]:
    """The metrics of all test images, whole and in float32, those of each class, and the classes that no image has.

    The images are shared among the processes; all get all of the metrics.

    Raises:
        ValueError: a test image or mask cannot be read, or no pixel has a class.
    """
    test, truth = loaded.test, loaded.truth
    outputs = found_in(network, test, accelerator)
    if isinstance(test, SegmentationDataset):
        masks = ((found.argmax(0).cpu(), sample.target["classes"]) for _, sample, found in outputs)
        matrix = torch.stack(gather(confusion(*pair, loaded.classes) for pair in masks)).sum(0)
        if not int(matrix.sum()):
            raise ValueError(f"the masks of {settings.data.test} are all void ({VOID}): there is nothing to score")
        names = test.part.classes
        return segmentation_scores(matrix), {"class": class_scores(matrix, names)}, absent_classes(matrix, names)
    assert isinstance(truth, coco.CocoSplit)
    ids = [photo.id for photo in test.photos]
    own = (scores.as_results(ids[index], found, truth.categories) for index, _, found in outputs)
    results = [row for rows in gather(own) for row in rows]
    metrics, items = by_class(scores.average_precision(truth.truth, results, scores.KINDS[settings.task], ids))
    return metrics, items, truth.absent


def found_in(
    network: nn.Module, test: DetectionDataset | SegmentationDataset, accelerator: Accelerator
) -> Iterator[tuple[int, Sample, Any]]:
    """This process's share of the test images: number, sample, and what the network gives for it."""
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
            pair = (targets[0]["classes"], found.argmax(0).to(torch.uint8))
            left, right = (pictures.draw_classes(sample.image, classes) for classes in pair)
            name = loaded.test.part.name(loaded.test.part.pairs[index])
        else:
            truth = loaded.truth
            assert isinstance(truth, coco.CocoSplit)
            left = pictures.draw_found(sample.image, targets[0], truth.categories, DRAWN)
            right = pictures.draw_found(sample.image, found, truth.categories, DRAWN)
            name = loaded.test.photos[index].path.stem
        pictures.save_beside(folder / f"{name}.jpg", left, right)
