"""One linear SVM for each class on pooled features: VOC07 classification by the rule of VISSL or of MoCo-kNN's paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clove_hub.data.files import described
from clove_hub.data.finder import class_folders
from clove_hub.data.voc import UNSURE, Truth, read_lists
from clove_hub.settings import fill

from ..weights.backbone import Backbone
from .kept import features_key, own_folder
from .processes import gather, share, world
from .progress import tracked
from .reading import MOST_OBLONG, central_square, pooled_features
from .result import Outcome
from .scores import average_precision
from .unfinished import once

VERSION = 2
RULE = "revisiting"
RANDOMNESS = "the solver"
PREPROCESSING = ("mean", "std")
FOLDS = 3
EPSILON = 1e-5
"""Added to the norm of the features."""

Row = NDArray[np.int8]
"""Of one class, for each image: 1, 0 or UNSURE."""


@dataclass(frozen=True)
class Rule:
    """The settings that define a way of training and scoring the SVMs."""

    costs: tuple[float, ...]
    """Those that C is chosen from for each class, by cross-validation; one alone is taken as it is."""
    squashed: bool
    """Whether the resized image is squashed to a square; otherwise its middle is cut out."""
    difficult_tested: bool
    """Whether an image with difficult examples alone counts against the class in the test, as it does in training; otherwise
    it does not count there."""


RULES = {
    "revisiting": Rule(costs=(0.5,), squashed=False, difficult_tested=True),
    "vissl": Rule(
        costs=(0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0), squashed=True, difficult_tested=False
    ),
}
"""`revisiting`: Van Gansbeke et al., "Revisiting Contrastive Methods for Unsupervised Learning of Visual Representations"
(NeurIPS 2021). `vissl`: Goyal et al., "Scaling and Benchmarking Self-Supervised Visual Representation Learning" (ICCV 2019)."""


@dataclass(frozen=True)
class Settings:
    rule: Literal["revisiting", "vissl"] = "revisiting"
    """How images are cropped, how C is chosen, and how images with only difficult examples count."""
    cost: float | None = None
    """C of the SVMs. Null: 0.5; with `vissl`, the best of eleven for each class, by cross-validation."""
    resize: int = 256
    """Short side in pixels before cropping or squashing to a square."""
    crop: int = 224
    """Side of the square in pixels."""
    batch: int = 32
    """Images in one forward pass."""

    def __post_init__(self) -> None:
        costs = RULES[self.rule].costs
        fill(self, {"cost": costs[0] if len(costs) == 1 else None})
        if (self.cost is not None and self.cost <= 0) or min(self.resize, self.crop, self.batch) < 1:
            raise ValueError(f"{self}: every setting must be positive")

    @property
    def costs(self) -> tuple[float, ...]:
        """Those that C is chosen from."""
        return RULES[self.rule].costs if self.cost is None else (self.cost,)


def evaluate(backbone: Backbone, data: Path, settings: Settings, seed: int) -> Outcome:
    """`mAP`, the mean over the classes of the average precision (percent); for an image folder, also `top1`.

    Args:
        data: PASCAL VOC (`ImageSets/Main/CLASS_trainval.txt` and `_test.txt`, `JPEGImages/`), or `train/` and `val/`
            with a sub-folder of images for each class.
        seed: of the order in which the solver visits the images.

    Raises:
        ValueError: scikit-learn is not installed, or something is wrong with the data.
    """
    solver()
    rule = RULES[settings.rule]
    voc = (data / "ImageSets" / "Main").is_dir()
    if voc:
        train, test = read_lists(data, "trainval"), read_lists(data, "test")
    else:
        suffixes = backbone.preprocessing.reading.suffixes
        first = class_folders(data / "train", suffixes=suffixes)
        if len(first.classes) < 2:
            raise ValueError(f"{data / 'train'} has only one class, {first.classes[0]!r}: at least two are needed")
        train, test = (
            Truth(part.photos, np.eye(len(part.classes), dtype=np.int8)[:, part.labels], part.classes)
            for part in (first, class_folders(data / "val", first.classes, suffixes))
        )
    require_examples(train, test, data, settings)
    square = squashed if rule.squashed else middle
    shown = f"linear-svm {settings} {seed} {[part.labels.tolist() for part in (train, test)]}"
    with own_folder(features_key(backbone, data, [*train.photos, *test.photos], shown)) as folder:
        size = settings.resize, settings.crop, settings.batch
        (learned, kept, unread), (tested, tested_kept, unread_tests) = (
            pooled_features(backbone, data, part.photos, *size, square, folder / name)
            for part, name in ((train, "train"), (test, "test"))
        )
        train, test = train.of(kept), test.of(tested_kept)
        require_examples(train, test, data, settings)
        features, asked = scaled(learned.numpy()), scaled(tested.numpy())

        def scored(row: Row) -> Tensor:
            """The scores of the test images by the SVM of one class: (M,)."""
            machine = trained(features, row == 1, settings.costs, seed)
            return torch.from_numpy(machine.decision_function(asked))

        own = tracked(share(list(enumerate(train.labels))), "one machine for each class")
        found = gather(once(folder / f"{number}.svm", partial(scored, row)) for number, row in own)
    scores = [one.numpy() for one in found]
    precisions = [class_precision(score, row, rule) for score, row in zip(scores, test.labels, strict=True)]
    metrics = {"mAP": 100 * float(np.mean(precisions))}
    if not voc:
        metrics["top1"] = 100 * float((np.argmax(scores, 0) == test.labels.argmax(0)).mean())
    classes = {
        name: {"AP": 100 * precision, "images": int((row == 1).sum())}
        for name, precision, row in zip(test.classes, precisions, test.labels, strict=True)
    }
    return Outcome(
        metrics,
        described(data, [*train.photos, *test.photos], len(test.photos)),
        (seed,),
        split="test" if voc else "val",
        items={"class": classes},
        left_out=unread + unread_tests,
    )


def scaled(features: NDArray[np.float32]) -> NDArray[np.float64]:
    """Features (N, C) of unit length, but for the little that is added to the norm."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True) + EPSILON
    result: NDArray[np.float64] = (features / lengths).astype(np.float64)
    return result


def solver() -> Callable[..., Any]:
    """scikit-learn's LinearSVC.

    Raises:
        ValueError: it is not installed.
    """
    try:
        found: Callable[..., Any] = import_module("sklearn.svm").LinearSVC
    except ImportError as error:
        raise ValueError("linear-svm needs scikit-learn: pip install 'clove-hub[evaluation]'") from error
    return found


def trained(features: NDArray[np.float64], positive: NDArray[np.bool_], costs: tuple[float, ...], seed: int) -> Any:
    """Train the SVM of one class, whose positives weigh twice as much; warn if it has not converged.

    Args:
        features: (N, C), of unit length.
        positive: of which images show the class, (N,); those with difficult examples alone do not.
        costs: candidates; the one with the best cross-validated average precision is taken, the first in a tie.
    """

    def machine(cost: float) -> Any:
        weights = {1: 2, -1: 1}
        return solver()(C=cost, class_weight=weights, loss="squared_hinge", dual=True, max_iter=2000, random_state=seed)

    labels = np.where(positive, 1, -1)
    if len(costs) == 1:
        return machine(costs[0]).fit(features, labels)
    # In processes: in threads liblinear's random numbers, which are global, would mix. By joblib alone: scikit-learn's own
    # `n_jobs` sends them this process's warning filters, and with these they import torch.
    joblib, selection = import_module("joblib"), import_module("sklearn.model_selection")
    scored = joblib.delayed(selection.cross_val_score)
    parts = list(selection.StratifiedKFold(FOLDS).split(features, labels))
    jobs = joblib.Parallel(max(joblib.cpu_count() // world()[1], 1))
    found = jobs(
        scored(machine(cost), features, labels, cv=[part], scoring="average_precision")
        for cost in reversed(costs)  # the longest first
        for part in parts
    )
    means = np.reshape(found, (len(costs), FOLDS)).mean(1)[::-1]
    return machine(costs[int(np.argmax(means))]).fit(features, labels)


def class_precision(scores: NDArray[np.float64], row: Row, rule: Rule) -> float:
    """Average precision of one class over the test images that count, in [0, 1].

    Args:
        scores: (M,).
    """
    counted = np.full(len(row), True) if rule.difficult_tested else row != UNSURE
    return average_precision(scores[counted], row[counted] == 1)


def middle(image: Image.Image, resize: int, crop: int, interpolation: str) -> Image.Image:
    """The short side resized bilinearly, whatever the model prefers, and the middle cut out."""
    return central_square(image, resize, crop, "bilinear")


def squashed(image: Image.Image, resize: int, crop: int, interpolation: str) -> Image.Image:
    """The short side resized bilinearly, and the whole squashed to a square."""
    scale = resize / min(image.size)
    width, height = (min(max(resize, round(side * scale)), MOST_OBLONG * resize) for side in image.size)
    kind = Image.Resampling.BILINEAR
    return image.resize((width, height), kind).resize((crop, crop), kind)


def require_examples(train: Truth, test: Truth, data: Path, settings: Settings) -> None:
    """Raises ValueError where a class is in no image, in all that are learned from, or in too few to choose C by."""
    for part, name in ((train, "training"), (test, "test")):
        if empty := [c for c, row in zip(part.classes, part.labels, strict=True) if not (row == 1).any()]:
            raise ValueError(f"the class {empty[0]!r} of {data} is in no {name} image")
    least = FOLDS if len(settings.costs) > 1 else 1
    for name, row in zip(train.classes, train.labels, strict=True):
        shown = int((row == 1).sum())
        if shown == len(row):
            raise ValueError(f"the class {name!r} of {data} is in every training image: there is nothing to learn")
        if min(shown, len(row) - shown) < least:
            raise ValueError(
                f"the class {name!r} of {data} is in {shown} of {len(row)} training images, too few to choose C by "
                f"cross-validation in {FOLDS} parts: give it, as in cost=0.5"
            )
