"""Weighted k-nearest-neighbor classification (Wu et al., CVPR 2018, section 3.4), by brute force, for several k at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from clove_hub.data.files import described
from clove_hub.data.finder import class_folders

from ..weights.backbone import Backbone
from .kept import features_key, own_folder
from .reading import pooled_features
from .result import Outcome

VERSION = 2
RULE = "wu2018"
RANDOMNESS = ""
PREPROCESSING = ("size", "crop_pct", "interpolation", "mean", "std")
REPORTED = 20
"""The k that papers have reported since DINO."""


@dataclass(frozen=True)
class Settings:
    neighbors: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers k of training images that vote for the class of an image; each is evaluated. `top1` and `top5` are for k
    = 20, or for the first k if 20 is not among them; the names of the others contain their k."""
    temperature: float = 0.07
    """Divides the cosines before the exponential that is the weight of a vote."""
    batch: int = 32
    """Images in one forward pass."""

    def __post_init__(self) -> None:
        if min(self.neighbors, default=0) < 1 or self.batch < 1 or self.temperature <= 0:
            raise ValueError(f"{self}: batch, temperature and at least one number of neighbors must be positive")

    @property
    def reported(self) -> int:
        return REPORTED if REPORTED in self.neighbors else self.neighbors[0]


def evaluate(backbone: Backbone, data: Path, settings: Settings, seed: int) -> Outcome:
    """Percentage of the validation images whose class ranks first (`top1`), or among the first five (`top5`).

    `top1 k=10` and so on are those for other numbers of neighbors than the reported one.

    Args:
        data: `train/` and `val/`, each with a sub-folder of images for each class.
        seed: nothing here is random.
    """
    seen = backbone.preprocessing
    bank = class_folders(data / "train", suffixes=seen.reading.suffixes)
    queries = class_folders(data / "val", bank.classes, seen.reading.suffixes)
    resize = round(seen.size / seen.crop_pct)
    files = [*bank.photos, *queries.photos]
    with own_folder(features_key(backbone, data, files, f"knn {resize} {settings.batch}")) as folder:
        (remembered, kept, unread), (asked, asked_kept, unread_queries) = (
            pooled_features(backbone, data, part.photos, resize, seen.size, settings.batch, kept=folder / split)
            for part, split in ((bank, "train"), (queries, "val"))
        )
    bank, queries = bank.of(kept), queries.of(asked_kept)
    truth = torch.tensor(queries.labels)
    votes = weighted_votes(
        F.normalize(asked, dim=1),
        F.normalize(remembered, dim=1),
        torch.tensor(bank.labels),
        len(bank.classes),
        settings.neighbors,
        settings.temperature,
    )
    tops = [1, 5] if len(bank.classes) > 5 else [1]
    metrics = {
        f"top{count}{'' if k == settings.reported else f' k={k}'}": 100 * share_right(votes[k], truth, count)
        for k in sorted(votes, key=lambda k: k != settings.reported)
        for count in tops
    }
    classes = {
        name: {"top1": 100 * share_right(votes[settings.reported][own], truth[own], 1), "images": int(own.sum())}
        for name, own in ((name, truth == label) for label, name in enumerate(bank.classes))
        if bool(own.any())
    }
    return Outcome(
        metrics,
        described(data, [*bank.photos, *queries.photos], len(truth)),
        (seed,),
        split="val",
        items={"class": classes},
        absent=queries.absent,
        left_out=unread + unread_queries,
    )


def weighted_votes(
    queries: Tensor, bank: Tensor, labels: Tensor, classes: int, neighbors: Sequence[int], temperature: float
) -> dict[int, Tensor]:
    """The votes for each class, for each number of neighbors: (N, K), float64.

    Each of the nearest images of the bank (or all, if it has fewer) votes for its class with exp(cosine / temperature).

    Args:
        queries: unit vectors (N, C).
        bank: unit vectors (M, C).
        labels: of the bank, (M,).
    """
    votes = {k: torch.zeros(len(queries), classes, dtype=torch.float64) for k in neighbors}
    most = min(max(neighbors), len(bank))
    for start in range(0, len(queries), 256):
        cosines, nearest = (queries[start : start + 256] @ bank.T).topk(most, dim=1)
        weights, voted = (cosines.double() / temperature).exp(), labels[nearest]
        for k, own in votes.items():
            own[start : start + 256].scatter_add_(1, voted[:, :k], weights[:, :k])
    return votes


def share_right(votes: Tensor, truth: Tensor, count: int) -> float:
    """The share of images whose class is among the `count` with most votes; of equals the first come first.

    Args:
        votes: (N, K).
        truth: (N,).
    """
    ranks = votes.argsort(dim=1, descending=True, stable=True)[:, :count]
    return float((ranks == truth[:, None]).any(1).double().mean())
