"""MoCo v2 (Chen, Fan, Girshick, He 2020), MoCo-kNN (Van Gansbeke, Vandenhende, Georgoulis, Van Gool; NeurIPS 2021).

A query, the student's embedding of one view of an image, is pulled toward its key, the teacher's embedding of another
view, and pushed away from the keys of earlier images in a queue. MoCo-kNN adds three invariances, each of which can be
enabled separately: small crops as further queries that must overlap the key's crop (`local_views`, `overlap`),
AutoAugment on every view except the key (`auto_augment`), and the keys of similar images as further positives
(`knn_weight`).

Two processes compute what one does up to rounding. Micro-batches of a step, however, are compared with a queue that
holds the keys before them, and keys are shuffled within each, so with accumulation `batch.per_device` changes the
result. Written from the papers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from clove_hub import losses
from clove_hub.backbones import feature_map, feature_shape
from clove_hub.batch_norm import batch_norms
from clove_hub.heads import pooled_projector
from clove_hub.settings import require_at_least
from clove_hub.views import Interpolation, Jitter, Overlap, View, Views, ViewSpec

from .base import (
    Logs,
    advance,
    embedding_spread,
    frozen_copy,
    gather_batch,
    move_toward,
    shuffled,
    unit,
)

KeyNorm = Literal["shuffled", "synchronized", "split"]
KnnOrder = Literal["enqueue_first", "look_first"]
KEY = 1
"""The index of the view whose teacher embedding is the key: the second large one."""


@dataclass(frozen=True)
class MocoSettings:
    """Settings of MoCo. Defaults are MoCo v2's: one pair of views, none of the invariances."""

    global_size: int = 224
    """Side of a large view in pixels. There are two: a query and the key."""
    global_scale: tuple[float, float] = (0.2, 1.0)
    """Fraction of the image's area that a large view covers."""
    local_views: int = 0
    """Small views, which are also queries."""
    local_size: int = 96
    """Side of a small view in pixels."""
    local_scale: tuple[float, float] = (0.05, 0.14)
    """Fraction of the image's area that a small view covers."""
    overlap: float = 0.0
    """Minimum fraction of a small view's area that overlaps the key's crop (constrained crops); 0 for no constraint."""
    auto_augment: float = 0.0
    """Probability that a query gets AutoAugment instead of jitter, grayscale and blur."""
    interpolation: Interpolation = "bilinear"
    """Interpolation of the crops."""
    projector_hidden: int = 2048
    """Channels of the projector's hidden layers."""
    feature_dim: int = 128
    """Length of an embedding."""
    queue: int = 65536
    """Keys kept as negatives."""
    temperature: float = 0.2
    """Divides the cosines in the loss."""
    key_norm: KeyNorm = "shuffled"
    """What prevents shared batch norm statistics from revealing which key belongs to a query. `shuffled`: the keys of a
    forward pass, of all processes, are shuffled over its groups (`batch.norm_group`), as in MoCo. `synchronized`: they
    are not, for groups so large that they reveal little about any image. `split` is the name that `shuffled` on one
    process had in version 0.1, accepted until 0.3."""
    key_norm_images: int | None = None
    """Without effect: use `batch.norm_group`. Accepted until version 0.3."""
    knn_weight: float = 0.0
    """Weight of the k-NN loss; 0 disables it and its queue of backbone features."""
    knn_neighbors: int = 20
    """Number of images in the queue, nearest to the query in the backbone's features, whose keys are positives."""
    knn_order: KnnOrder = "enqueue_first"
    """Whether neighbors are searched after the step's own keys are enqueued, as in the released code, where such a
    neighbor stands for the key that it replaced, or before, as in its warm-up variant."""
    knn_warmup_epochs: float = 0.0
    """Epochs without the k-NN loss, until neighbors are meaningful."""

    def __post_init__(self) -> None:
        for key, allowed in (("key_norm", KeyNorm), ("knn_order", KnnOrder)):
            if getattr(self, key) not in get_args(allowed):
                raise ValueError(f"method.{key}={getattr(self, key)!r}: choose one of {', '.join(get_args(allowed))}")
        require_at_least(0, self, "method", "local_views", "knn_weight", "knn_warmup_epochs")
        require_at_least(1, self, "method", "queue", "knn_neighbors")
        if not self.temperature > 0:
            raise ValueError(f"method.temperature={self.temperature}: must be above 0")
        if self.knn_weight and self.knn_neighbors > self.queue:
            raise ValueError(
                f"method.knn_neighbors={self.knn_neighbors} is more than method.queue={self.queue} holds: "
                "lower the first or raise the second"
            )


@dataclass(frozen=True)
class MocoKnnSettings(MocoSettings):
    """The same, with the defaults of MoCo-kNN: all three invariances."""

    global_size: int = 160
    local_views: int = 4
    overlap: float = 0.1
    auto_augment: float = 0.5
    knn_weight: float = 0.4


class Moco(nn.Module):
    """MoCo around a timm backbone, whose feature map is pooled by its mean.

    Raises:
        ValueError: the backbone cannot take the views.
    """

    exported = "student"

    def __init__(self, backbone: nn.Module, settings: MocoSettings) -> None:
        super().__init__()
        s = self.settings = settings
        self.view_spec = view_spec(s)
        channels = feature_shape(backbone, s.global_size, "method.global_size")[0]
        if s.local_views:
            feature_shape(backbone, s.local_size, "method.local_size")  # the backbone may refuse the size
        projector = pooled_projector(channels, s.projector_hidden, s.feature_dim)
        self.student = nn.ModuleDict({"backbone": backbone, "projector": projector})
        self.teacher = nn.ModuleDict({key: frozen_copy(module) for key, module in self.student.items()})

        self.queue: Tensor  # (K, C), keys of unit length
        self.queue_features: Tensor  # (K, F), the teacher's pooled backbone features of them, of unit length
        self.queue_start: Tensor  # where the oldest is
        self.register_buffer("queue", F.normalize(torch.randn(s.queue, s.feature_dim), dim=1))
        self.register_buffer("queue_start", torch.zeros((), dtype=torch.long))
        if s.knn_weight:
            self.register_buffer("queue_features", F.normalize(torch.randn(s.queue, channels), dim=1))
        self.with_neighbors = s.knn_weight > 0 and s.knn_warmup_epochs == 0

        self.shuffles = s.key_norm != "synchronized" and any(batch_norms(self.teacher))

    def begin_step(self, momentum: float, epoch: float) -> None:
        self.with_neighbors = self.settings.knn_weight > 0 and epoch >= self.settings.knn_warmup_epochs
        move_toward(self.teacher, self.student, momentum)

    def forward(self, views: Sequence[Views]) -> tuple[Tensor, Logs]:
        with record_function("student"):
            features = torch.cat([pooled(self.student, pixels) for pixels in queries(views)])  # (V, B, F)
            query = unit(self.student["projector"](features))  # (V, B, C)
        with record_function("teacher"), torch.no_grad():
            key, key_features = self.keys(views[0].pixels[KEY])  # (B, C), (B, F)
        with record_function("loss"), torch.autocast(query.device.type, enabled=False):
            queue = self.queue.clone()  # the negatives; the queue itself changes before the backward pass
            if enqueue_first := self.settings.knn_order == "enqueue_first":
                self.enqueue(key, key_features)
            neighbors = self.neighbors(unit(features.detach())) if self.with_neighbors else None
            if not enqueue_first:
                self.enqueue(key, key_features)
            return self.loss(query, key, queue, neighbors)

    def loss(self, query: Tensor, key: Tensor, queue: Tensor, neighbors: Tensor | None) -> tuple[Tensor, Logs]:
        """Mean contrastive loss of queries (V, B, C) with their key (B, C), a queue (K, C) and their neighbors.

        Args:
            neighbors: indices into the queue (V, B, k), or None for a loss without them.
        """
        s = self.settings
        sharp = query / s.temperature
        positive = (sharp * key).sum(-1)  # (V, B)
        negative = sharp @ queue.T  # (V, B, K)
        contrast = losses.queue_contrast(positive, negative).mean()
        nearest = query.new_zeros(()) if neighbors is None else losses.neighbor_contrast(negative, neighbors).mean()
        logs = {
            "positive_cosine": positive.detach().mean() * s.temperature,
            "negative_cosine": negative.detach().mean() * s.temperature,
            "embedding_spread": embedding_spread(key),
        }
        if s.knn_weight:
            logs |= {"contrast": contrast.detach(), "neighbor_contrast": nearest.detach()}
        return contrast + s.knn_weight * nearest, logs

    def neighbors(self, features: Tensor) -> Tensor:
        """Indices into the queue of the nearest backbone features: (V, B, F) of unit length -> (V, B, k)."""
        return (features @ self.queue_features.T).topk(self.settings.knn_neighbors, dim=-1).indices

    def keys(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's embeddings and pooled features, of unit length: (B, 3, S, S) -> (B, C), (B, F).

        `key_norm` determines the order of the images, and so which of them share batch norm statistics.
        """
        if not self.shuffles:
            return self.embed(pixels)
        key, features = shuffled(self.teacher, pixels, self.embed, ", or choose method.key_norm=synchronized")
        return key, features

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) -> (B, C), (B, F), in one pass of the teacher."""
        features = pooled(self.teacher, pixels[None])[0]
        return unit(self.teacher["projector"](features)), unit(features)

    @torch.no_grad()
    def enqueue(self, key: Tensor, features: Tensor) -> None:
        """Enqueue the keys of every process, replacing the oldest."""
        size = len(self.queue)
        new = gather_batch(key)[-size:]
        places = advance(self.queue_start, len(new), size)
        self.queue[places] = new.to(self.queue.dtype)
        if self.settings.knn_weight:
            self.queue_features[places] = gather_batch(features)[-size:].to(self.queue_features.dtype)


def queries(views: Sequence[Views]) -> list[Tensor]:
    """The pixels of all views except the key, by size."""
    large = views[0].pixels
    first = torch.cat([large[:KEY], large[KEY + 1 :]]) if len(large) > 2 else large[:KEY]
    return [first, *(group.pixels for group in views[1:])]


def pooled(network: nn.ModuleDict, pixels: Tensor) -> Tensor:
    """The mean over the backbone's feature map: (V, B, 3, S, S) -> (V, B, F)."""
    return feature_map(network["backbone"], pixels.flatten(0, 1)).mean((-2, -1)).view(*pixels.shape[:2], -1)


def view_spec(settings: MocoSettings) -> ViewSpec:
    """MoCo v2's two equal views and small ones; AutoAugment on all except the key."""
    s = settings
    jitter = Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, probability=0.8)
    key = View(s.global_size, s.global_scale, jitter=jitter, gray=0.2, blur=0.5, interpolation=s.interpolation)
    query = replace(key, auto_augment=s.auto_augment)
    overlap = Overlap(view=KEY, share=s.overlap) if s.overlap else None
    local = replace(query, size=s.local_size, scale=s.local_scale, overlap=overlap)
    return ViewSpec(views=(query, key, *(local,) * s.local_views))
