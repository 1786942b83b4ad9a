"""Semantic segment retrieval: regions of a validation image get the class of the nearest region of the training images.

A rule defines the regions. `regions`: clusters of the features of the cells, found by k-means, as in Van Gansbeke et
al., "Revisiting Contrastive Methods for Unsupervised Learning of Visual Representations" (NeurIPS 2021).
`maskcontrast`: the salient object, as in Van Gansbeke et al., "Unsupervised Semantic Segmentation by Contrasting Object
Mask Proposals" (ICCV 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from clove_hub.data.files import described
from clove_hub.data.masks import VOID, Pair, Segmented, open_segmented, read_indices, same_size
from clove_hub.settings import fill
from clove_hub.views import Purpose, stream

from ..weights.backbone import Backbone, is_plain_resnet, with_stride_one
from .kept import features_key, own_folder
from .reading import LeftOut, each_readable, normalized
from .regions import SALIENT, Regions, describe, salient, spherical_kmeans
from .result import Outcome
from .scores import absent_classes, class_scores, segmentation_scores

VERSION = 2
RULE = "regions"
RULES: Mapping[str, Mapping[str, Any]] = {"regions": {"regions": 15}, "maskcontrast": {"saliency": "saliency"}}
"""The settings that each rule has alone."""
RANDOMNESS = "the start of k-means"
PREPROCESSING = ("mean", "std")
TRUTH = "truth"
"""Instead of a folder of saliency masks: the object is what has another class than the first."""

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    rule: Literal["regions", "maskcontrast"] = "regions"
    """What a region is: a cluster of cells, or the salient object."""
    regions: int | None = None
    """Clusters in each image, for the rule regions. Null: 15."""
    saliency: str | None = None
    """Folder in the data with a saliency mask NAME.png for each image, for the rule maskcontrast. Null: `saliency`.
    `truth`: all pixels whose class is not the first are salient, which reveals where the object is."""
    fine: bool | None = None
    """Whether a ResNet's layer4 keeps the resolution of layer3, so that a cell is 16 pixels wide and not 32. Null: true
    for plain ResNets, false for other networks."""
    train: str = "train"
    """Name of the training split."""
    test: str = "val"
    """Name of the test split."""
    train_images: int | None = None
    """At most this many, spread evenly over the list; null for all."""
    test_images: int | None = None
    """Like `train_images`, for the test split."""

    def __post_init__(self) -> None:
        for rule, own in RULES.items():
            if rule != self.rule and (given := [name for name in own if getattr(self, name) is not None]):
                raise ValueError(f"retrieve.{given[0]} belongs to rule={rule}: leave it out, or set rule={rule}")
        fill(self, RULES[self.rule])
        counts = [count for count in (self.regions, self.train_images, self.test_images) if count is not None]
        if min(counts, default=1) < 1:
            raise ValueError(f"{self}: regions and the limits must be positive")

    @property
    def randomness(self) -> str:
        return RANDOMNESS if self.rule == "regions" else ""


class Seen(NamedTuple):
    """An image on its way to its regions."""

    number: int
    """In the split."""
    photo: Path
    pixels: Tensor
    """Normalized, (C, H, W)."""
    mask: Tensor
    """The class of each pixel, uint8 (H, W)."""
    saliency: Tensor
    """0 to 1, (H, W)."""


class Divided(NamedTuple):
    """An image and its regions."""

    photo: Path
    truth: Tensor
    """The class of each pixel, 255 where there is none: uint8 (H, W)."""
    places: Tensor
    """The region of each pixel: (H, W)."""
    regions: Regions


class Bank(NamedTuple):
    """The regions of all training images that are retrieved, those of no class left out."""

    vectors: Tensor
    """(N, C)."""
    classes: Tensor
    """(N,)."""
    part: Segmented
    """The images that could be read."""
    left_out: LeftOut
    """The others, and why."""

    def classes_of(self, regions: Regions) -> Tensor:
        """The class of each region of an image: the given one, or that of the nearest region here: (R,)."""
        nearest = self.classes[(regions.vectors @ self.vectors.T).argmax(1)]
        return torch.where(regions.given < 0, nearest, regions.given)


def evaluate(backbone: Backbone, data: Path, settings: Settings, seed: int) -> Outcome:
    """`mIoU` and `pixel accuracy` of the images of the test split.

    An absent class counts 0 in the mean by the rule maskcontrast, and not at all by the other.

    Args:
        data: images with a mask each, in one of the layouts of `open_segmented`.
        seed: of the first centers of k-means.
    """
    train, test = open_splits(data, settings)
    backbone, settings = prepared(backbone, settings)
    files = used(data, (train, test), settings)
    with own_folder(features_key(backbone, data, files, f"retrieve {settings} {seed} {train} {test}")) as folder:
        bank = remember(backbone, data, train, settings, seed, folder / "train")
        asked, test, unread_tests = divided(
            backbone, data, test, settings, seed, lambda image: tuple(image.regions), folder / "test"
        )
    unread, train = bank.left_out, bank.part
    matrix = torch.zeros(len(train.classes), len(train.classes), dtype=torch.int64)
    for image in map(Regions._make, asked):
        matrix.index_add_(1, bank.classes_of(image), image.counts.T)
    if not int(matrix.sum()):
        raise ValueError(f"the masks of {data} ({settings.test}) are all void")
    return Outcome(
        segmentation_scores(matrix, absent_as_zero=settings.rule == "maskcontrast"),
        described(data, used(data, (train, test), settings), len(test.pairs)),
        (seed,),
        split=settings.test,
        items={"class": class_scores(matrix, train.classes)},
        absent=absent_classes(matrix, test.classes),
        left_out=unread + unread_tests,
        chosen={"fine": settings.fine},
    )


def used(data: Path, parts: Sequence[Segmented], settings: Settings) -> list[Path]:
    """The files of images, masks and saliency masks."""
    files = [path for part in parts for pair in part.pairs for path in pair]
    return files + [
        path for part in parts for pair in part.pairs if (path := saliency_file(data, part, pair, settings))
    ]


def open_splits(data: Path, settings: Settings) -> tuple[Segmented, Segmented]:
    """The training and the test images."""
    return (
        open_segmented(data, settings.train).spread(settings.train_images),
        open_segmented(data, settings.test).spread(settings.test_images),
    )


def prepared(backbone: Backbone, settings: Settings) -> tuple[Backbone, Settings]:
    """The backbone with the map that the settings ask for, and the settings with `fine` as it is then.

    Raises:
        ValueError: `fine` is set, and the model has no finer map.
    """
    can = is_plain_resnet(backbone.model)
    if settings.fine and not can:
        raise ValueError(
            f"fine=true is for layer4 of a ResNet of plain blocks, which {backbone.name} is not: leave fine out to use the map "
            "as it is"
        )
    settings = replace(settings, fine=can if settings.fine is None else settings.fine)
    return replace(backbone, model=with_stride_one(backbone.model, "layer4")) if settings.fine else backbone, settings


def remember(
    backbone: Backbone, data: Path, train: Segmented, settings: Settings, seed: int, kept: Path | None = None
) -> Bank:
    """Build the bank of the regions of the training images. All processes must call it.

    Args:
        kept: as in `each_readable`.

    Raises:
        ValueError: no pixel of a training image has a class.
    """
    rows, part, left_out = divided(backbone, data, train, settings, seed, lambda image: tuple(image.regions), kept)
    found = [Regions._make(row) for row in rows]
    vectors, classes = torch.cat([r.vectors for r in found]), torch.cat([r.classes for r in found])
    known = (classes < len(part.classes)) & (torch.cat([r.given for r in found]) < 0)
    if not bool(known.any()):
        where = (
            "are all void" if settings.rule == "regions" else "have only the first class where the images are salient"
        )
        raise ValueError(f"the masks of {data} ({settings.train}) {where}: there is nothing to retrieve")
    return Bank(vectors[known], classes[known], part, left_out)


def divided(
    backbone: Backbone,
    data: Path,
    part: Segmented,
    settings: Settings,
    seed: int,
    take: Callable[[Divided], T],
    kept: Path | None = None,
) -> tuple[list[T], Segmented, LeftOut]:
    """The images that can be read with their regions, these images, and the others. All processes must call it.

    Args:
        take: what is taken of each image.
        kept: as in `each_readable`.
    """
    seen = backbone.preprocessing

    def load(item: tuple[int, Pair]) -> Seen:
        number, pair = item
        photo = seen.reading.levels(pair[0])
        mask = torch.from_numpy(part.mask(pair, (photo.shape[1], photo.shape[0])))
        path = saliency_file(data, part, pair, settings)
        saliency = read_saliency(path, pair[0], mask) if path else ((mask > 0) & (mask < VOID)).float()
        return Seen(number, pair[0], normalized(photo, seen.mean, seen.std), mask, saliency)

    def work(loaded: list[Seen]) -> T:
        (one,) = loaded
        wide = backbone.padded(one.pixels[None])
        features = backbone.maps(wide)[0][0].float().cpu()  # (C, h, w)
        height, width = one.mask.shape
        if settings.rule == "maskcontrast":
            shares = height / wide.shape[2], width / wide.shape[3]
            regions = salient(features, one.saliency, one.mask, len(part.classes), shares)
            return take(Divided(one.photo, one.mask, (one.saliency > SALIENT).long(), regions))
        assert settings.regions is not None
        cells = F.normalize(features, dim=0).flatten(1).T  # (h * w, C)
        assigned = spherical_kmeans(cells, settings.regions, stream(seed, 0, one.number, Purpose.VIEWS))
        rows, columns = (
            torch.arange(side) * cells_across // padded_side
            for side, cells_across, padded_side in zip(one.mask.shape, features.shape[1:], wide.shape[2:], strict=True)
        )
        places = assigned.view(features.shape[1:])[rows][:, columns]
        return take(
            Divided(one.photo, one.mask, places, describe(cells, assigned, places, one.mask, len(part.classes)))
        )

    found, whole, left_out = each_readable(list(enumerate(part.pairs)), load, work, 1, data, kept)
    return found, part.of(whole), left_out


def saliency_file(data: Path, part: Segmented, pair: Pair, settings: Settings) -> Path | None:
    """Where the saliency mask of an image is; None where the settings need none.

    Raises:
        ValueError: it is missing.
    """
    if settings.saliency in (None, TRUTH):
        return None
    path = data / settings.saliency / f"{part.name(pair)}.png"
    if not path.is_file():
        raise ValueError(
            f"the saliency mask {path} is missing: rule=maskcontrast needs one for each image. Name another folder in {data}, as "
            "in saliency=saliency_unsupervised_model; set saliency=truth, which takes the objects from the masks; or set "
            "rule=regions"
        )
    return path


def read_saliency(path: Path, photo: Path, mask: Tensor) -> Tensor:
    """A saliency mask, gray of 0 to 255 or of 0 and 1, as 0 to 1: (H, W).

    Args:
        mask: of the classes, whose size it must have.

    Raises:
        ValueError: it cannot be read, has other values, or another size.
    """
    values = torch.from_numpy(read_indices(path))
    same_size(path, values.numpy(), photo, (mask.shape[1], mask.shape[0]))
    greatest = int(values.max())
    if greatest > 255:
        raise ValueError(f"{path} has the value {greatest}; expected a saliency mask of 0 to 255, or of 0 and 1")
    return values / (255.0 if greatest > 1 else 1.0)
