"""The two splits of a folder of labeled photos for a task: read, limited, checked, and every image decoded once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from clove_hub.check import Checked, check, require_good
from clove_hub.data import coco
from clove_hub.data.files import Data, chosen, spread
from clove_hub.data.masks import Segmented, open_segmented, training_split
from clove_hub.data.voc import read_splits
from clove_hub.evaluation.processes import gather, share

from ..run.folder import RunFolder
from .dataset import DetectionDataset, SegmentationDataset, mirror_partners
from .jitter import Jitter
from .loop import bar
from .settings import DetectionImages, FinetuneSettings, Task

log = logging.getLogger(__name__)

DONE = "checked.json"
"""The file in a run's folder that records the data whose images were all checked."""


@dataclass(frozen=True)
class TaskData:
    """The data of a task, both splits, checked."""

    folder: Path
    task: Task
    train: DetectionDataset | SegmentationDataset
    test: DetectionDataset | SegmentationDataset
    chosen: list[int] | list[str]
    """The training images within the limits of `data`, before those without an instance were left out."""
    truth: coco.CocoSplit | Segmented
    """The split that is scored."""
    fingerprint: str

    @property
    def scored(self) -> Data:
        """The data set that a result names."""
        return Data(self.folder.resolve().name, self.fingerprint, len(self.test))

    @property
    def names(self) -> list[str]:
        """Names of the classes, for detectors without the background."""
        truth = self.truth
        return list(truth.classes) if isinstance(truth, Segmented) else [one.name for one in truth.categories]

    @property
    def classes(self) -> int:
        """Number of classes, for detectors without the background."""
        return len(self.names)

    @property
    def keypoints(self) -> int:
        """Number of keypoints per person; 0 if the task has none."""
        return 0 if isinstance(self.truth, Segmented) else len(self.truth.categories[0].keypoints)

    @property
    def without_object(self) -> tuple[str, ...]:
        """Classes of a detector that no test image has an object of."""
        assert isinstance(self.test, DetectionDataset)
        there = {number for photo in self.test.photos for number in photo.labels.tolist()}
        return tuple(name for number, name in enumerate(self.names, start=1) if number not in there)

    def counts(self, confusion: Tensor) -> dict[str, dict[str, int]]:
        """The frequency of each class in the test images.

        Args:
            confusion: confusion of all test images.
        """
        if isinstance(self.test, SegmentationDataset):
            return {name: {"pixels": n} for name, n in zip(self.names, confusion.sum(1).tolist(), strict=True)}
        labels = [photo.labels for photo in self.test.photos]
        return {
            name: {
                "images": sum(number in own for own in labels),
                "instances": sum((own == number).sum() for own in labels),
            }
            for number, name in enumerate(self.names, start=1)
        }


def load_data(settings: FinetuneSettings, folder: Path, mean: Sequence[float]) -> TaskData:
    """Read and check both splits.

    Args:
        mean: mean of the backbone's images, used to pad an image that is smaller than its crop or square.

    Raises:
        ValueError: the folder does not have the task's layout, or the splits do not match.
    """
    few, seed = settings.data, settings.run.seed
    red, green, blue = (round(255 * value) for value in mean)
    color = red, green, blue
    if settings.task == "segmentation":
        assert not isinstance(settings.images, DetectionImages)
        train = open_segmented(folder, few.train or training_split(folder)).spread(few.train_images)
        test = open_segmented(folder, few.test).spread(few.test_images)
        by_name = {train.name(pair): pair for pair in train.pairs}
        names = chosen(list(by_name), few.fraction, few.list_seed)
        few_pairs = replace(train, pairs=[by_name[name] for name in names])
        return TaskData(
            *(folder, settings.task),
            SegmentationDataset(few_pairs, settings.images, color, seed),
            SegmentationDataset(test, settings.images, color),
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
    images = settings.images
    assert isinstance(images, DetectionImages)
    jitter = Jitter(images.lsj, images.lsj_scale, color) if images.lsj else None
    return TaskData(
        *(folder, settings.task),
        DetectionDataset(usable, seed, partners, jitter),
        DetectionDataset(spread(truth.photos, few.test_images), None, partners),
        ids,
        truth,
        hashlib.sha256(f"{photos.fingerprint}{truth.fingerprint}".encode()).hexdigest(),
    )


def require_sound(folder: RunFolder, loaded: TaskData, accelerator: Accelerator, workers: int) -> None:
    """Check all images, divided among the processes, unless the run's folder records that this was done.

    Raises:
        ValueError: some are broken; all processes raise it.
    """
    try:
        done = json.loads((folder.path / DONE).read_text(encoding="utf-8")) == {"data": loaded.fingerprint}
    except (OSError, ValueError):
        done = False
    if folder.peers.from_main(done):
        return
    found: list[Checked] = []
    for images in (loaded.train.checkable, loaded.test.checkable):
        own = share(range(len(images.paths)))
        found += gather(bar(check(images, own, workers), "checking the images", accelerator, len(own)))
    require_good(found, loaded.folder, loaded.task)
    folder.write_text(DONE, json.dumps({"data": loaded.fingerprint}) + "\n")
    log.info("all %d images can be read and fit their annotations", len(found))
