"""One linear SVM for each class on pooled features: VOC07 classification as VISSL and MoCo-kNN measure it.

Goyal et al., "Scaling and Benchmarking Self-Supervised Visual Representation Learning" (ICCV 2019), section 6.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.nn import functional as F

from clove_hub.data.files import described
from clove_hub.data.finder import class_folders
from clove_hub.data.voc import UNSURE, Truth, read_lists

from ..weights.backbone import Backbone
from .processes import gather, share
from .reading import pooled_features
from .result import Outcome
from .scores import average_precision

VERSION = 1
RULE = "vissl"
RANDOMNESS = "the solver"
PREPROCESSING = ("interpolation", "mean", "std")


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


def evaluate(backbone: Backbone, data: Path, settings: Settings, seed: int) -> Outcome:
    """`mAP`, the mean over the classes of the average precision (percent); for an image folder `top1` too.

    Args:
        data: PASCAL VOC (`ImageSets/Main/CLASS_trainval.txt` and `_test.txt`, `JPEGImages/`), or `train/` and `val/`
            with a sub-folder of images for each class.
        seed: of the order in which the solver visits the images.

    Raises:
        ValueError: scikit-learn is not installed, or something is wrong with the data.
    """
    try:
        svm = import_module("sklearn.svm").LinearSVC
    except ImportError as error:
        raise ValueError("linear-svm needs scikit-learn: pip install 'clove-hub[evaluation]'") from error
    voc = (data / "ImageSets" / "Main").is_dir()
    if voc:
        train, test = read_lists(data, "trainval"), read_lists(data, "test")
    else:
        suffixes = backbone.preprocessing.reading.suffixes
        first = class_folders(data / "train", suffixes=suffixes)
        if len(first.classes) < 2:
            raise ValueError(
                f"{data / 'train'} has one class only, {first.classes[0]!r}: there is nothing to tell apart"
            )
        train, test = (
            Truth(part.photos, np.eye(len(part.classes), dtype=np.int8)[:, part.labels], part.classes)
            for part in (first, class_folders(data / "val", first.classes, suffixes))
        )
    require_examples(train, test, data)
    (learned, kept, unread), (tested, tested_kept, unread_tests) = (
        pooled_features(backbone, data, part.photos, settings.resize, settings.crop, settings.batch)
        for part in (train, test)
    )
    train, test = train.of(kept), test.of(tested_kept)
    require_examples(train, test, data)
    features, asked = (F.normalize(part, dim=1).double().numpy() for part in (learned, tested))

    def scored(row: NDArray[np.int8]) -> NDArray[np.float64]:
        """The scores of the test images by the SVM of one class, whose positives weigh twice as much: (M,)."""
        machine = svm(
            C=settings.cost,
            class_weight={1: 2, -1: 1},
            loss="squared_hinge",
            dual=True,
            max_iter=2000,
            random_state=seed,
        )
        machine.fit(features[row != UNSURE], np.where(row[row != UNSURE] == 1, 1, -1))  # warns if not converged
        scores: NDArray[np.float64] = machine.decision_function(asked)
        return scores

    scores = gather(map(scored, share(list(train.labels))))
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
        left_out=unread + unread_tests,
    )


def require_examples(train: Truth, test: Truth, data: Path) -> None:
    """Raises ValueError where a class is in no image, or in all that are learned from."""
    for part, name in ((train, "training"), (test, "test")):
        if empty := [c for c, row in zip(part.classes, part.labels, strict=True) if not (row == 1).any()]:
            raise ValueError(f"the class {empty[0]!r} of {data} is in no {name} image")
    if constant := [c for c, row in zip(train.classes, train.labels, strict=True) if not (row == 0).any()]:
        raise ValueError(f"the class {constant[0]!r} of {data} is in every training image: there is nothing to learn")
