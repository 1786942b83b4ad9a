"""`clove-hub check`: find the faults of a data set before a run or a fine-tuning starts.

Every image is decoded once, in several processes, and checked against its annotations. For images other than photos, it
measures the mean and standard deviation of each band, with which a run normalizes them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple, get_args

from tqdm.auto import tqdm

from .command import FAILED, Command, user_path
from .data import coco, voc
from .data.bands import MEASURED, PHOTOS, Depth, Reading, Sums, measured, sums, write_measured
from .data.finder import some_images
from .data.images import BrokenImage, orientation, printable, read_bytes
from .data.masks import Segmented, open_segmented, segmentation_splits

ROBOFLOW = "*/_annotations.coco.json"
TASKS = (*get_args(coco.Task), "segmentation")
Size = tuple[int, int]
"""Width and height in pixels, upright."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        type=user_path,
        metavar="DATA",
        help="a folder of images, or one with annotations as `clove-hub downstream torchvision` reads it",
    )
    parser.add_argument(
        "--task", choices=TASKS, help="the task of the annotations (default: the task found, or only the images)"
    )
    parser.add_argument(
        "--bands",
        type=int,
        metavar="N",
        help=f"number of bands (data.bands of a run): measures mean and standard deviation of each, and stores them in "
        f"DATA/{MEASURED}, where `clove-hub pretrain` finds them (default: photos; nothing is measured)",
    )
    parser.add_argument(
        "--depth",
        type=int,
        choices=get_args(Depth),
        help="bits per value to keep (data.depth of a run; default: 8 for three bands, else 16)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        metavar="N",
        help="processes that decode; 0 for only this one (default: one per core)",
    )


def run(options: argparse.Namespace) -> int:
    """Print the faults; return 1 if there are any, else 0.

    Raises:
        ValueError: it is not a folder of images, its annotations are not in the layout of the task, or a decoding
            process was killed.
    """
    if not options.data.is_dir():
        raise ValueError(f"{options.data} is not a folder; expected one with images")
    if options.workers < 0:
        raise ValueError(f"--workers is {options.workers}; expected 0 or more")
    if options.bands is not None and options.bands < 1:
        raise ValueError(f"--bands is {options.bands}; expected 1 or more")
    bands = options.bands or 3
    reading = Reading(bands, options.depth or (8 if bands == 3 else 16))
    total = bad = 0
    values: list[Sums] = []
    for name, images in parts(options.data, options.task, reading):
        numbers = range(len(images.paths))
        done = check(images, numbers, options.workers, measure=options.bands is not None)
        found = list(tqdm(done, name, len(numbers), leave=False, disable=None))
        for one in found:
            if one.problem:
                print(f"{one.name.removeprefix(f'{printable(options.data)}/')}: {one.problem}")
        total, bad = total + len(found), bad + sum(bool(one.problem) for one in found)
        print("\n".join([f"{name}: {len(found)} images", *facts(found, images)]))
        values += [one.values for one in found if one.values is not None]
    if values:
        statistics = measured(total, sum(values[1:], values[0]))
        for key in ("mean", "std"):
            print(f"data.{key}=[{','.join(f'{value:.6g}' for value in getattr(statistics, key))}]")
        stored = write_measured(options.data, reading, statistics)
        print(f"stored in {printable(stored)}, where clove-hub pretrain with data.bands={bands} finds them")
    print(f"{bad} of {total} images {'is' if bad == 1 else 'are'} bad" if bad else f"all {total} images are good")
    return FAILED if bad else 0


CHECK = Command(
    "Decode every image of a data set once; list those that cannot be read or contradict their annotations. "
    "The exit code is 1 if there is one.",
    add_arguments,
    run,
)


@dataclass(frozen=True)
class Images:
    """Images, and what is known of each."""

    paths: Sequence[Path]
    known: Sequence[Size] | Segmented | None = None
    """The sizes that their annotations were made for, or their masks."""
    reading: Reading = PHOTOS
    """What they are decoded into."""

    def problem(self, index: int, size: Size) -> str:
        """The contradiction between an image of this size and its annotations; empty if there is none."""
        if isinstance(self.known, Segmented):
            try:
                self.known.mask(self.known.pairs[index], size)
            except ValueError as error:
                return str(error)
        elif self.known is not None and size != (expected := self.known[index]):
            return f"{size[0]} x {size[1]} pixels, its annotations are for {expected[0]} x {expected[1]}"
        return ""


def with_boxes(photos: Sequence[coco.Photo], reading: Reading = PHOTOS) -> Images:
    return Images([photo.path for photo in photos], [(photo.width, photo.height) for photo in photos], reading)


def with_masks(part: Segmented, reading: Reading = PHOTOS) -> Images:
    return Images([photo for photo, _ in part.pairs], part, reading)


def parts(data: Path, task: str | None, reading: Reading = PHOTOS) -> Iterator[tuple[str, Images]]:
    """Name and images of each split, or of the folder where there are no annotations.

    Raises:
        ValueError: as the readers of the layouts.
    """
    given = task is not None
    if task is None and segmentation_splits(data):
        task = "segmentation"
    elif task is None and (voc.has_boxes(data) or any(data.glob("annotations/*.json")) or any(data.glob(ROBOFLOW))):
        keypoints_alone = any(data.glob("annotations/person_keypoints_*")) and not any(
            data.glob("annotations/instances_*")
        )
        task = "keypoints" if keypoints_alone else "detection"
    if task is None:
        found = some_images(data, reading.suffixes)
        print(f"{printable(data)}: {found.tally}, without annotations in a known layout")
        yield printable(data.resolve().name), Images(found.paths, reading=reading)
        return
    print(f"{printable(data)}: annotations for {task}{'' if given else '; --task NAME checks those for another task'}")
    if task == "segmentation":
        for split in segmentation_splits(data) or ["train"]:
            yield split, with_masks(open_segmented(data, split), reading)
    else:
        splits = voc.read_splits(data, task)  # type: ignore[arg-type]  # argparse has checked it
        for name, part in zip(("train", "val"), splits, strict=True):
            yield name, with_boxes(part.photos, reading)


class Checked(NamedTuple):
    """What was found out about an image."""

    name: str
    size: Size | None
    """None where it cannot be read."""
    turned: int
    """Its EXIF orientation, 1 for none."""
    problem: str
    """Empty if there is none."""
    values: Sums | None = None
    """Of its bands, where they were measured."""


def check(images: Images, numbers: Sequence[int], workers: int, measure: bool = False) -> Iterator[Checked]:
    """Checks the images with these numbers, in their order.

    Args:
        workers: processes that decode; 0 decodes in this one.
        measure: whether to also sum the values of each band.

    Raises:
        ValueError: a process was killed, for lack of memory or by a decoder's crash.
    """
    if workers == 0 or len(numbers) < 2:
        yield from (_check(images, number, measure) for number in numbers)
        return
    how = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, how, _begin, (images, measure)) as pool:
        try:
            yield from pool.map(_check_own, numbers, chunksize=min(64, -(-len(numbers) // workers)))
        except BrokenProcessPool as error:
            raise ValueError(
                "a process that decodes images was killed: memory ran out, or the decoder crashed. Fewer workers need less "
                "memory"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_own: tuple[Images, bool]
"""In a process of the pool: what is checked. Sent along with each number it would be sent a million times."""


def _begin(images: Images, measure: bool) -> None:
    global _own
    _own = images, measure


def _check_own(number: int) -> Checked:
    return _check(_own[0], number, _own[1])


def _check(images: Images, number: int, measure: bool) -> Checked:
    name = printable(images.paths[number])
    try:
        data = read_bytes(images.paths[number], name)
        pixels = images.reading.decode(data, name)
        height, width = pixels.shape[:2]
    except BrokenImage as error:
        return Checked(name, None, 1, error.reason)
    turned = orientation(data) if images.reading.of_photos else 1
    problem = images.problem(number, (width, height))
    if problem and turned >= 5 and not images.problem(number, (height, width)):
        problem += (
            f"; they fit the stored image, before its EXIF orientation ({turned}) is applied: remove the orientation "
            f"(exiftool -Orientation= FILE), or annotate the upright image"
        )
    return Checked(name, (width, height), turned, problem, sums(pixels) if measure else None)


def require_good(found: Sequence[Checked], folder: Path, task: str) -> None:
    """Raise ValueError if an image of a data set has a problem."""
    if bad := [f"{one.name}: {one.problem}" for one in found if one.problem]:
        raise ValueError(
            f"{len(bad)} of {len(found)} images cannot be used: {'; '.join(bad[:3])}{'; ...' if len(bad) > 3 else ''}. "
            f"`clove-hub check {shlex.quote(str(folder))} --task {task}` lists all: fix them, or take them out of the data set"
        )


def facts(found: Sequence[Checked], images: Images) -> list[str]:
    """Lines about sizes and orientations."""
    lines = []
    if sizes := [one.size for one in found if one.size is not None]:
        for name, sides in zip(("width", "height"), zip(*sizes, strict=True), strict=True):
            lines.append(f"  {name}: {min(sides)} to {max(sides)}, median {median(sides):g} pixels")
    if turned := [one for one in found if one.turned != 1]:
        line = f"  {len(turned)} are turned or mirrored by their EXIF orientation"
        alike = [one for one in turned if one.turned < 5 and not one.problem]
        if alike and images.known is not None:
            line += (
                f", {len(alike)} of them without a change of size ({', '.join(one.name for one in alike[:3])}): check "
                "that their annotations were made on the upright image"
            )
        lines.append(line)
    return lines
