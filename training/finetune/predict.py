"""`clove-hub predict MODEL IMAGES --out DIR`: find objects or classes in photos with a fine-tuned model.

DIR/coco_results.json   all detections in COCO's results format, which pycocotools scores
DIR/coco_dataset.json   the same as a data set in COCO's format, with images and classes, which other tools open
DIR/pictures/           the images with what was found
DIR/masks/              for segmentation: the class of each pixel, from 0, as PNG
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clove_hub.command import Command, require_installed, user_path
from clove_hub.data.coco import images_of
from clove_hub.data.finder import some_images
from clove_hub.data.images import BrokenImage, printable, read_image
from clove_hub.evaluation.progress import progress_shown, tracked
from clove_hub.evaluation.reading import batches, in_threads, settle, unless_broken
from clove_hub.global_state import kept_generators
from clove_hub.runs import write_whole
from clove_hub.weights.finetuned import MODEL

if TYPE_CHECKING:
    from .detector import Detector, Found

log = logging.getLogger(__name__)

RESULTS, DATASET = "coco_results.json", "coco_dataset.json"
DRAWN = 0.5
"""Minimum score of drawn objects, unless --threshold is higher."""
AHEAD = 4
"""Number of images read in parallel."""


@dataclass(frozen=True)
class Listed:
    """An image to predict."""

    id: int
    name: str
    """Its path below the given folder, which is also used in --out."""
    path: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "images", nargs="+", type=user_path, metavar="IMAGES", help="image files, or folders of them at any depth"
    )
    parser.add_argument("--out", required=True, type=user_path, metavar="DIR", help="the folder for JSON and pictures")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.0,
        metavar="SCORE",
        help="leave out objects with a lower score (default: keep all, as average precision needs them); pictures "
        f"show those with a score of {DRAWN} or more",
    )
    listed = "a COCO annotation file: predict its images, from the one folder IMAGES, with their ids"
    parser.add_argument("--annotations", type=user_path, metavar="FILE", help=listed)
    parser.add_argument("--no-pictures", action="store_true", help="write only JSON (and masks)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: an accelerator if there is one)")


def run(options: argparse.Namespace) -> int:
    require_installed(("torchvision", "pycocotools"), "downstream")
    from .detector import load_detector, require_threshold  # after checking that its imports are installed

    require_threshold(options.threshold)
    listed = list_images(options.images, options.annotations)
    if options.out.is_file():
        raise ValueError(f"--out {options.out} is a file; give a folder")
    with kept_generators(), progress_shown():
        detector = load_detector(options.model, options.device)
        if options.annotations:
            _require_categories(detector, options.annotations)
        count, left_out = write_found(detector, listed, options.out, options.threshold, not options.no_pictures)
    noun = "class masks" if detector.settings.task == "segmentation" else "objects"
    missing = f", {len(left_out)} left out" if left_out else ""
    print(f"{len(listed) - len(left_out)} images{missing}: {count} {noun} -> {options.out / RESULTS}")
    if not count:
        print("The file is an empty list, which pycocotools' loadRes cannot read: every AP is 0.")
    return 0


def list_images(given: Sequence[Path], annotations: Path | None) -> list[Listed]:
    """The images to predict: numbered from 1 in the order of their names, or as in an annotation file.

    Raises:
        ValueError: a folder has no image, a path does not exist, two images have the same name, or an image in the
            annotation file is not in the folder.
    """
    if annotations is not None:
        if len(given) != 1 or not given[0].is_dir():
            raise ValueError(f"--annotations {annotations} needs the one folder that holds its images as IMAGES")
        return [
            Listed(number, path.relative_to(given[0]).as_posix(), path)
            for number, path in images_of(annotations, given[0])
        ]
    named: dict[str, Path] = {}
    for place in given:
        if not place.exists():
            raise ValueError(f"{printable(place)} does not exist: give image files, or folders of them")
        found = some_images(place).paths if place.is_dir() else [place]
        for path in found:
            name = printable(path.relative_to(place) if place.is_dir() else path.name)
            if other := named.get(name):
                raise ValueError(
                    f"{printable(other)} and {printable(path)} would have the same name: give a folder that contains both"
                )
            named[name] = path
    return [Listed(number, name, path) for number, (name, path) in enumerate(sorted(named.items()), start=1)]


def write_found(
    detector: Detector, listed: Sequence[Listed], out: Path, threshold: float = 0.0, pictures: bool = True
) -> tuple[int, tuple[tuple[str, str], ...]]:
    """Predict for images and write the results.

    Args:
        out: the folder described in the module's docstring.
        threshold: objects with a lower score are left out.
        pictures: whether to draw them.

    Returns:
        The number of rows of the results; name and reason of each image that could not be read.

    Raises:
        ValueError: too many images cannot be read, or the folder cannot be written.
    """
    rows: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    problems: list[BrokenImage | None] = []
    loaded = in_threads(unless_broken(read_image), batches([one.path for one in listed], AHEAD))
    each = (image for some in loaded for image in some)
    for one, image in tracked(zip(listed, each, strict=True), "looking at the images", len(listed)):
        problems.append(BrokenImage(one.name, image.reason) if isinstance(image, BrokenImage) else None)
        if isinstance(image, BrokenImage):
            continue
        found = detector.find(image, threshold)
        rows += found.coco(one.id)
        images.append({"id": one.id, "file_name": one.name, "height": image.shape[0], "width": image.shape[1]})
        try:
            _write_pictures(found, image, out, one.name, threshold, pictures)
        except OSError as error:
            raise ValueError(f"cannot write {error.filename or out}: {error.strerror}; give another --out") from error
    left_out = settle(problems)
    info = {"description": "predictions", "model": detector.stored.name, "sha256": detector.stored.sha256}
    document = dataset(detector, images, rows) | {"info": info | {"left_out": [list(one) for one in left_out]}}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / RESULTS, json.dumps(rows) + "\n")
        write_whole(out / DATASET, json.dumps(document, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror}; give another --out") from error
    return len(rows), left_out


def dataset(
    detector: Detector, images: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """The results as a data set in COCO's format: each is an annotation, with its `score`.

    Args:
        images: image rows of the document.
        rows: rows in COCO's results format.
    """
    from pycocotools import mask

    annotations = []
    for number, row in enumerate(rows, start=1):
        whole = dict(row)
        if shape := row.get("segmentation"):
            whole["area"] = float(mask.area(shape))
            whole.setdefault("bbox", mask.toBbox(shape).tolist())
        else:
            whole["area"] = row["bbox"][2] * row["bbox"][3]
        if "keypoints" in row:
            whole["num_keypoints"] = len(row["keypoints"]) // 3
        annotations.append({"id": number, **whole, "iscrowd": 0})
    categories = []
    for category in detector.categories:
        points = {"keypoints": list(category.keypoints), "skeleton": [[a + 1, b + 1] for a, b in category.skeleton]}
        categories.append({"id": category.id, "name": category.name} | (points if category.keypoints else {}))
    return {"images": list(images), "annotations": annotations, "categories": categories}


def _write_pictures(found: Found, image: Any, out: Path, name: str, threshold: float, pictures: bool) -> None:
    """Write the image with its predictions; for segmentation also the mask."""
    import torch
    from PIL import Image

    from .drawing import draw_classes, draw_found, palette, save_beside

    if found.classes is not None:
        place = out / "masks" / f"{name}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(found.classes).save(place)
    if not pictures:
        return
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    if found.classes is not None:
        drawn, seen = draw_classes(pixels, found.tensors["classes"]), np.unique(found.classes)
        legend = {found.categories[number].name: palette(number) for number in seen.tolist()}
    else:
        least = max(threshold, DRAWN)
        drawn = draw_found(pixels, found.tensors, found.categories, least)
        seen = np.unique(found.labels[found.scores >= least])
        legend = {found.categories[number].name: palette(number + 1) for number in seen.tolist()}
    save_beside(out / "pictures" / f"{name.removesuffix('.jpg')}.jpg", (name,), (drawn,), legend)


def _require_categories(detector: Detector, annotations: Path) -> None:
    """Raise ValueError unless the annotation file has the model's classes, by id and name."""
    from clove_hub.data.coco_document import read_images

    theirs = {row["id"]: row["name"] for row in read_images(annotations)[1]}
    other = [f"{one.id} {one.name}" for one in detector.categories if theirs.get(one.id) != one.name]
    if other:
        raise ValueError(
            f"{annotations} has {len(theirs)} categories, but {detector.stored.what} finds {len(detector.categories)}, of "
            f"which the file lacks {', '.join(other[:5])}: leave out --annotations, or give the file of the model's data"
        )


PREDICT = Command(__doc__, add_arguments, run)
