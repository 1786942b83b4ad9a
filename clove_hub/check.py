"""`clove-hub check`: what a run or a fine-tuning would stumble over in a data set, found before it starts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import get_args

from tqdm.auto import tqdm

from .command import FAILED, Command, user_path
from .data import coco, detection, voc
from .data.checking import Boxed, Checked, Images, Masked, Unlabeled, check
from .data.finder import some_images
from .data.images import printable
from .data.masks import open_segmented

ROBOFLOW = "*/_annotations.coco.json"
TASKS = (*get_args(coco.Task), "segmentation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        type=user_path,
        metavar="DATA",
        help="a folder of images, or one with annotations as `clove-hub downstream torchvision` reads it",
    )
    parser.add_argument(
        "--task", choices=TASKS, help="what the annotations are for (default: what there is; else images alone)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        metavar="N",
        help="processes that decode; 0 for this one alone (default: one for each processor core)",
    )


def run(options: argparse.Namespace) -> int:
    """Prints what is bad and returns 1 if there is something, else 0.

    Raises:
        ValueError: it is not a folder of images, or its annotations are not in the layout of the task,
            or a process that decodes was killed.
    """
    if not options.data.is_dir():
        raise ValueError(f"{options.data} is not a folder; expected one with images")
    if options.workers < 0:
        raise ValueError(f"--workers is {options.workers}; expected 0 or more")
    total = bad = 0
    for name, images in parts(options.data, options.task):
        numbers = range(len(images.paths))
        done = check(images, numbers, options.workers)
        found = list(tqdm(done, name, len(numbers), leave=False, disable=None))
        for one in found:
            if one.problem:
                print(f"{one.name.removeprefix(f'{printable(options.data)}/')}: {one.problem}")
        total, bad = total + len(found), bad + sum(bool(one.problem) for one in found)
        print("\n".join([f"{name}: {len(found)} images", *facts(found, images)]))
    print(f"{bad} of {total} images are bad" if bad else f"all of {total} images are good")
    return FAILED if bad else 0


CHECK = Command(
    "Decode every image of a data set once; list those that cannot be read or contradict their annotations. "
    "The exit code is 1 if there is one.",
    add_arguments,
    run,
)


def parts(data: Path, task: str | None) -> Iterator[tuple[str, Images]]:
    """Name and images of each split, or of the folder where there are no annotations.

    Raises:
        ValueError: as the readers of the layouts.
    """
    if task is None and segmentation_splits(data):
        task = "segmentation"
    elif task is None and (voc.has_boxes(data) or any(data.glob("annotations/*.json")) or any(data.glob(ROBOFLOW))):
        keypoints_alone = any(data.glob("annotations/person_keypoints_*")) and not any(
            data.glob("annotations/instances_*")
        )
        task = "keypoints" if keypoints_alone else "detection"
    if task is None:
        found = some_images(data)
        print(f"{printable(data)}: {found.tally}")
        yield printable(data.resolve().name), Unlabeled(found.paths)
    elif task == "segmentation":
        for split in segmentation_splits(data) or ["train"]:
            yield split, Masked(open_segmented(data, split))
    else:
        splits = detection.read_splits(data, task)  # type: ignore[arg-type]  # argparse has checked it
        for name, part in zip(("train", "val"), splits, strict=True):
            yield name, Boxed.of(part)


def segmentation_splits(data: Path) -> list[str]:
    """The splits of a folder with masks, in any of the layouts; none if it is not in one of them."""
    if (data / "classes.json").is_file():
        return sorted(path.stem for path in data.glob("*.txt"))
    if lists := sorted((data / "ImageSets" / "Segmentation").glob("*.txt")):
        return [path.stem for path in lists if path.stem != "trainval"]  # which is the two others
    return sorted(path.name for path in (data / "leftImg8bit").glob("*") if path.is_dir())


def facts(found: Sequence[Checked], images: Images) -> list[str]:
    """Lines about sizes and orientations."""
    sizes = [one.size for one in found if one.size is not None]
    lines = []
    if sizes:
        for name, sides in (("width", [w for w, _ in sizes]), ("height", [h for _, h in sizes])):
            lines.append(f"  {name}: {min(sides)} to {max(sides)}, median {median(sides):g} pixels")
    if turned := [one for one in found if one.turned != 1]:
        line = f"  {len(turned)} are turned or mirrored by their EXIF orientation"
        alike = [one for one in turned if one.turned < 5 and not one.problem]
        if alike and not isinstance(images, Unlabeled):
            line += (
                f", {len(alike)} of them without another size ({', '.join(one.name for one in alike[:3])}): look "
                "whether their annotations were made on the upright image"
            )
        lines.append(line)
    return lines
