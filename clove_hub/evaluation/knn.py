"""Weighted k-nearest-neighbor classification (Wu et al., CVPR 2018, section 3.4), by brute force."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from clove_hub.data.files import described
from clove_hub.data.finder import class_folders

from ..weights.backbone import Backbone
from .reading import pooled_features
from .result import Outcome

VERSION = 1
RULE = "wu2018"
RANDOMNESS = ""
PREPROCESSING = ("size", "crop_pct", "interpolation", "mean", "std")


@dataclass(frozen=True)
class Settings:
    neighbors: int = 20
    """Training images that vote for the class of an image."""
    temperature: float = 0.07
    """Divides the cosines before the exponential, the weight of a vote."""
    batch: int = 32
    """Images in one forward pass."""

    def __post_init__(self) -> None:
        if min(self.neighbors, self.batch) < 1 or self.temperature <= 0:
            raise ValueError(f"{self}: neighbors, batch and temperature must be positive")


def evaluate(backbone: Backbone, data: Path, settings: Settings, seed: int) -> Outcome:
    """`top1` and `top5`: percent of the validation images whose class is the first, or among the first five.

    Args:
        data: `train/` and `val/`, each with a sub-folder of images for each class.
        seed: nothing here is random.
    """
    seen = backbone.preprocessing
    bank = class_folders(data / "train", suffixes=seen.reading.suffixes)
    queries = class_folders(data / "val", bank.classes, seen.reading.suffixes)
    resize = round(seen.size / seen.crop_pct)
    (remembered, kept, unread), (asked, asked_kept, unread_queries) = (
        pooled_features(backbone, data, part.photos, resize, seen.size, settings.batch) for part in (bank, queries)
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
    ranks = votes.argsort(dim=1, descending=True, stable=True)
    right = ranks == truth[:, None]
    metrics = {"top1": 100 * float(right[:, 0].double().mean())}
    if len(bank.classes) > 5:
        metrics["top5"] = 100 * float(right[:, :5].any(1).double().mean())
    classes = {
        name: {"top1": 100 * float(right[own, 0].double().mean()), "images": int(own.sum())}
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
    queries: Tensor, bank: Tensor, labels: Tensor, classes: int, neighbors: int, temperature: float
) -> Tensor:
    """The votes for each class: (N, K), float64.

    Each of the `neighbors` nearest images of the bank (or all, if it has fewer) votes for its class with
    exp(cosine / temperature).

    Args:
        queries: unit vectors (N, C).
        bank: unit vectors (M, C).
        labels: of the bank, (M,).
    """
    votes = torch.zeros(len(queries), classes, dtype=torch.float64)
    for rows, out in zip(torch.split(queries, 256), torch.split(votes, 256), strict=True):
        cosines, nearest = (rows @ bank.T).topk(min(neighbors, len(bank)), dim=1)
        out.scatter_add_(1, labels[nearest], (cosines.double() / temperature).exp())
    return votes
