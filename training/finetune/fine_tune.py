"""One fine-tuning from data and backbone to results.json: check, build, train, score, draw."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from clove_hub.data import coco, detection, masks
from clove_hub.data.files import Data
from clove_hub.data.subset import chosen
from clove_hub.evaluation.processes import gather, share
from clove_hub.evaluation.result import Record, by_class, now, versions, write
from clove_hub.evaluation.scores import absent_classes
from clove_hub.runs import another_run, newest_checkpoint
from clove_hub.weights import load

from ..run.checkpoints import read_tensors
from ..run.stopping import FINISHED, STOPPED
from . import drawing as pictures
from . import scores
from .checked import require_sound
from .dataset import Detections, Scenes, mirror_partners
from .loop import Job, bar, make_precise, on_device, synchronized, train
from .networks import build, misplaced
from .schedule import plan
from .settings import SegmentationImages, Settings, as_sections, differences

log = logging.getLogger(__name__)

VERSION = 1
DRAWN = 0.5
"""The score from which on a detection is drawn."""


@dataclass(frozen=True)
class Loaded:
    """The data of a task, both splits, checked."""

    train: Detections | Scenes
    val: Detections | Scenes
    chosen: list[int] | list[str]
    """The training images that `data.fraction` has left, before those without an instance were left out."""
    classes: int
    """Without the background for detectors."""
    keypoints: int
    splits: tuple[coco.CocoSplit, coco.CocoSplit] | tuple[masks.Segmented, masks.Segmented]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("".join(split.fingerprint for split in self.splits).encode()).hexdigest()


def run(settings: Settings, backbone: str, data: Path, out: Path) -> int:
    """Fine-tunes, scores, draws; returns FINISHED or STOPPED.

    Raises:
        ValueError: something the user has to mend, found before the first step.
        FloatingPointError: the loss was not finite.
    """
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no" if settings.run.precision == "fp32" else settings.run.precision,
    )
    if settings.batch.total % accelerator.num_processes:
        raise ValueError(
            f"batch.total={settings.batch.total} does not divide among {accelerator.num_processes} processes: choose a "
            "multiple of that"
        )

    # ---- data, backbone, network -------------------------------------------------------------------------------
    loaded = load_data(settings, data)
    source = load(backbone, seed=settings.run.seed)
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
        require_same_run(out, found[1], facts)
    if found and (out / "results.json").is_file():
        log.info("%s is finished (%d steps); nothing to do", out, found[1]["step"])
        return FINISHED
    command = f"clove-hub check {shlex.quote(str(data))} --task {settings.task}"
    checkable = [part.checkable for part in (loaded.train, loaded.val)]
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
        network.load_state_dict(read_tensors(found[0], "model"))
        network.to(accelerator.device)
    elif not train(job, network, accelerator, (found[0], done) if found else None):
        return STOPPED
    if settings.run.precise_bn:
        make_precise(job, network, accelerator)

    # ---- scores and pictures -----------------------------------------------------------------------------------
    scored, absent = evaluate(network.eval(), loaded, settings, accelerator)
    metrics, items = by_class(scored)
    seconds = round(time.perf_counter() - began, 3)
    if absent:
        log.warning("classes that no validation image has, and that the scores say nothing of: %s", ", ".join(absent))
    if accelerator.is_main_process:
        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, out / "model.safetensors")
        draw(network, loaded, settings, accelerator.device, out / "pictures")
        samples = len(loaded.val)
        record = Record(
            protocol=f"torchvision-{settings.task}",
            version=VERSION,
            rule="own",
            split="val",
            model=backbone,
            architecture=source.architecture,
            weights=facts["backbone"],
            metrics=metrics,
            deviations={},
            seeds=(settings.run.seed,),
            randomness="fine-tuning",
            random_weights=source.kind == "random",
            absent=absent,
            left_out=(),
            data=Data(data.resolve().name, loaded.fingerprint, samples),
            settings=as_sections(settings) | {"steps": schedule.steps, "train_images": len(loaded.train)},
            preprocessing=facts["normalization"],
            items=items,
            seconds=None if done else seconds,  # what was trained before a stop is not known
            versions=versions() | {name: version(name) for name in packages(settings)},
            date=now(),
        )
        write(record, out / "results.json")
        said = ", ".join(f"{name} {value:.1f}" for name, value in metrics.items())
        log.info("%s on %d images: %s -> %s", settings.task, samples, said, out / "results.json")
    accelerator.wait_for_everyone()
    return FINISHED


# ---- data -------------------------------------------------------------------------------------------------------------


def load_data(settings: Settings, folder: Path) -> Loaded:
    """Reads and checks both splits.

    Raises:
        ValueError: the folder is absent or not in the task's layout, or the splits do not fit together.
    """
    if not folder.is_dir():
        raise ValueError(f"--data {folder} is not a folder")
    few, seed = settings.data, settings.run.seed
    if settings.task == "segmentation":
        assert isinstance(settings.images, SegmentationImages)
        train, val = (masks.open_segmented(folder, split) for split in (masks.training_split(folder), "val"))
        by_name = {train.name(pair): pair for pair in train.pairs}
        names = chosen(list(by_name), few.fraction, few.list_seed)
        return Loaded(
            Scenes(replace(train, pairs=[by_name[name] for name in names]), settings.images, seed),
            Scenes(val, settings.images),
            names,
            len(train.classes),
            0,
            (train, val),
        )
    photos, truth = detection.read_splits(folder, settings.task)
    ids = chosen([photo.id for photo in photos.photos], few.fraction, few.list_seed)
    wanted = set(ids)
    partners = mirror_partners(photos.categories[0].keypoints)
    usable = [photo for photo in coco.trainable(photos, settings.task) if photo.id in wanted]
    if not usable:
        raise ValueError(
            f"data.fraction={few.fraction:g} leaves {len(ids)} images of {photos.path}, none with a usable annotation: "
            "raise it"
        )
    return Loaded(
        Detections(usable, seed, partners),
        Detections(truth.photos, None, partners),
        ids,
        len(photos.categories),
        len(photos.categories[0].keypoints),
        (photos, truth),
    )


def require_same_run(out: Path, state: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raises ValueError where the folder holds a run of other settings, data or weights."""
    changed = differences(state["settings"], facts["settings"])
    changed += [f"another {key}" for key in ("backbone", "normalization", "data") if state[key] != facts[key]]
    if changed:
        raise ValueError(another_run(out, changed, "--out"))


def packages(settings: Settings) -> list[str]:
    return ["torchvision", "accelerate"] + (["pycocotools"] if settings.task != "segmentation" else [])


# ---- scores and pictures ---------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    network: nn.Module, loaded: Loaded, settings: Settings, accelerator: Accelerator
) -> tuple[dict[str, float], tuple[str, ...]]:
    """The metrics of all validation images, in float32, and the classes that none of them has.

    The images are shared among the processes; all get all of the metrics.
    """
    if isinstance(loaded.val, Scenes):
        classes = loaded.classes
        matrices = gather(_matrices(network, loaded.val, classes, accelerator))
        matrix, names = torch.stack(matrices).sum(0), loaded.val.part.classes
        return scores.mean_iou(matrix, names), absent_classes(matrix, names)
    truth = loaded.splits[1]
    assert isinstance(truth, coco.CocoSplit)
    results = [row for rows in gather(_results(network, loaded.val, truth, accelerator)) for row in rows]
    return scores.average_precision(truth.truth, results, scores.KINDS[settings.task]), truth.absent


def _matrices(network: nn.Module, val: Scenes, classes: int, accelerator: Accelerator) -> Iterator[Tensor]:
    for index in bar(share(range(len(val))), "evaluation", accelerator):
        sample = val[0, index]
        images, _ = on_device([sample], accelerator.device)
        yield scores.confusion(network(images)[0].argmax(0).cpu(), sample.target["classes"], classes)


def _results(
    network: nn.Module, val: Detections, truth: coco.CocoSplit, accelerator: Accelerator
) -> Iterator[list[dict[str, Any]]]:
    for index in bar(share(range(len(val))), "evaluation", accelerator):
        images, _ = on_device([val[0, index]], accelerator.device)
        yield scores.as_results(val.photos[index].id, network(images)[0], truth.categories)


@torch.no_grad()
def draw(network: nn.Module, loaded: Loaded, settings: Settings, device: torch.device, folder: Path) -> None:
    """The first validation images with what is there on the left and what was found on the right."""
    for index in range(min(settings.run.pictures, len(loaded.val))):
        sample = loaded.val[0, index]
        images, targets = on_device([sample], device)
        found = network(images)[0]
        if isinstance(loaded.val, Scenes):
            pair = (targets[0]["classes"], found.argmax(0).to(torch.uint8))
            left, right = (pictures.draw_classes(sample.image, classes) for classes in pair)
            name = loaded.val.part.name(loaded.val.part.pairs[index])
        else:
            truth = loaded.splits[1]
            assert isinstance(truth, coco.CocoSplit)
            left = pictures.draw_found(sample.image, targets[0], truth.categories, DRAWN)
            right = pictures.draw_found(sample.image, found, truth.categories, DRAWN)
            name = loaded.val.photos[index].path.stem
        pictures.save_beside(folder / f"{name}.jpg", left, right)
