"""One linear SVM for each class on pooled features: VOC07 classification as VISSL and MoCo-kNN measure it.

Goyal et al., "Scaling and Benchmarking Self-Supervised Visual Representation Learning" (ICCV 2019), section 6.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.nn import functional as F

from clove_hub.data.classes import class_folders
from clove_hub.data.files import described, lines, require

from ..weights.backbone import Backbone
from .pooling import pooled_features
from .processes import gather, share
from .result import Outcome
from .scores import average_precision

VERSION = 1
RULE = "vissl"
RANDOMNESS = "the solver"
PREPROCESSING = ("interpolation", "mean", "std")
UNSURE = -1
"""In `Truth.labels`: the image counts neither for nor against the class."""


@dataclass(frozen=True)
class Settings:
    cost: float = 0.5
    """C of the SVM."""
    resize: int = 256
    """Pixels of the short side before the crop."""
    crop: int = 224
    """Pixels a side of the central crop."""
    batch: int = 32
    """Images in one forward pass."""

    def __post_init__(self) -> None:
        if self.cost <= 0 or min(self.resize, self.crop, self.batch) < 1:
            raise ValueError(f"{self}: every setting must be positive")


@dataclass(frozen=True)
class Truth:
    """Images, and for each class whether it is in them."""

    photos: list[Path]
    labels: NDArray[np.int8]
    """(classes, images): 1, 0 or UNSURE."""
    classes: list[str]


def evaluate(backbone: Backbone, data: Path, settings: Settings, seed: int) -> Outcome:
    """`mAP`, the mean over the classes of the average precision (percent); for an image folder `top1` too.

    Args:
        data: PASCAL VOC (`ImageSets/Main/CLASS_trainval.txt` and `_test.txt`, `JPEGImages/`), or `train/` and `val/`
            with a sub-folder of images for each class.
        seed: of the order in which the solver visits the images.

    Raises:
        ValueError: scikit-learn is not installed, or something is wrong with the data.
    """
    voc = (data / "ImageSets" / "Main").is_dir()
    train, test = (read_voc(data, "trainval"), read_voc(data, "test")) if voc else read_folders(data)
    for part, name in ((train, "training"), (test, "test")):
        if empty := [c for c, row in zip(part.classes, part.labels, strict=True) if not (row == 1).any()]:
            raise ValueError(f"the class {empty[0]!r} of {data} is in no {name} image")
    if constant := [c for c, row in zip(train.classes, train.labels, strict=True) if not (row == 0).any()]:
        raise ValueError(f"the class {constant[0]!r} of {data} is in every training image: there is nothing to learn")
    features, asked = (
        F.normalize(pooled_features(backbone, part.photos, settings.resize, settings.crop, settings.batch), dim=1)
        .double()
        .numpy()
        for part in (train, test)
    )

    def own() -> Iterator[NDArray[np.float64]]:
        for row in share(list(train.labels)):
            yield fit_svm(features[row != UNSURE], row[row != UNSURE] == 1, settings.cost, seed, asked)

    scores = gather(own())
    precisions = [
        average_precision(score[row != UNSURE], row[row != UNSURE] == 1)
        for score, row in zip(scores, test.labels, strict=True)
    ]
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
    )


def fit_svm(
    features: NDArray[np.float64], positive: NDArray[np.bool_], cost: float, seed: int, asked: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Trains the SVM of one class and returns its scores of other images.

    Squared hinge, l2 penalty, and positives that weigh twice as much, as in the protocol.

    Args:
        features: (N, C).
        positive: (N,).
        asked: (M, C).

    Returns:
        (M,), greater for images with the class.
    """
    try:
        machine = import_module("sklearn.svm").LinearSVC
    except ImportError as error:
        raise ValueError("linear-svm needs scikit-learn: pip install 'clove-hub[evaluation]'") from error

    weights = {1: 2, -1: 1}
    svm = machine(C=cost, class_weight=weights, loss="squared_hinge", dual=True, max_iter=2000, random_state=seed)
    svm.fit(features, np.where(positive, 1, -1))  # warns where it has not converged
    scores: NDArray[np.float64] = svm.decision_function(asked)
    return scores


def read_voc(root: Path, split: str) -> Truth:
    """PASCAL VOC's classification lists: 1 has the class, -1 has not, 0 shows only difficult examples of it.

    Raises:
        ValueError: there is no list, two of them name other images, a line is malformed, or an image is missing.
    """
    folder = root / "ImageSets" / "Main"
    paths = sorted(folder.glob(f"*_{split}.txt"))
    if not paths:
        raise ValueError(f"{folder} has no list CLASS_{split}.txt")
    names: list[str] = []
    rows = []
    for path in paths:
        entries = [line.split() for line in lines(path)]
        if wrong := [entry for entry in entries if len(entry) != 2 or entry[1] not in ("1", "-1", "0")]:
            raise ValueError(f"{path} has the line {' '.join(wrong[0])!r}; expected a name and 1, -1 or 0")
        own = [name for name, _ in entries]
        if names and own != names:
            raise ValueError(f"{path} lists other images than {paths[0]}")
        names = own
        rows.append([{"1": 1, "-1": 0, "0": UNSURE}[label] for _, label in entries])
    photos = [require(root / "JPEGImages" / f"{name}.jpg", f"the image {name} of {paths[0].name}") for name in names]
    classes = [path.stem.removesuffix(f"_{split}") for path in paths]
    return Truth(photos, np.array(rows, dtype=np.int8), classes)


def read_folders(root: Path) -> tuple[Truth, Truth]:
    """`train/` and `val/` with a sub-folder for each class."""
    train = class_folders(root / "train")
    if len(train.classes) < 2:
        raise ValueError(f"{root / 'train'} has one class only, {train.classes[0]!r}: there is nothing to tell apart")
    parts = (train, class_folders(root / "val", train.classes))
    first, second = (
        Truth(part.photos, np.eye(len(part.classes), dtype=np.int8)[:, part.labels], part.classes) for part in parts
    )
    return first, second
