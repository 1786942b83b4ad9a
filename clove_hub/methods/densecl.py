"""DenseCL: dense contrastive learning (Wang, Zhang, Shen, Kong, Li; CVPR 2021, arXiv:2011.09157).

MoCo v2 with a second head, which keeps the grid. Each cell of the query is pulled toward the cell of the key that
resembles it most in the backbone's features, and pushed away from the pooled dense embeddings of earlier images, which
are kept in a separate queue. Written from the paper.

Two processes compute what one does up to rounding where nothing normalizes over a batch; otherwise the keys are
shuffled over the batch-norm groups, which is random. Micro-batches of a step are compared with queues that hold the
keys before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from clove_hub import losses
from clove_hub.backbones import feature_map, feature_shape
from clove_hub.batch_norm import batch_norms
from clove_hub.heads import pooled_projector
from clove_hub.settings import require_at_least
from clove_hub.views import Interpolation, Jitter, View, Views, ViewSpec

from .base import Logs, advance, embedding_spread, frozen_copy, gather_batch, move_toward, shuffled, unit

QUERY, KEY = 0, 1
"""The indices of the two views."""


@dataclass(frozen=True)
class DenseClSettings:
    """Settings of DenseCL. Defaults are the paper's."""

    global_size: int = 224
    """Side of the two views in pixels."""
    global_scale: tuple[float, float] = (0.2, 1.0)
    """Fraction of the image's area that a view covers."""
    interpolation: Interpolation = "bilinear"
    """Interpolation of the crops."""
    projector_hidden: int = 2048
    """Channels of the hidden layer of both heads."""
    feature_dim: int = 128
    """Channels of an embedding."""
    queue: int = 65536
    """Images whose keys are kept as negatives."""
    temperature: float = 0.2
    """Divides the cosines in both losses."""
    dense_weight: float = 0.5
    """Weight of the dense loss (lambda in Eq. 3); the global loss has 1 minus it."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "method", "queue")
        if not self.temperature > 0:
            raise ValueError(f"method.temperature={self.temperature}: must be above 0")
        if not 0 <= self.dense_weight <= 1:
            raise ValueError(f"method.dense_weight={self.dense_weight}: must be between 0 and 1")


class DenseCl(nn.Module):
    """DenseCL around a timm backbone.

    Raises:
        ValueError: the backbone cannot take the views.
    """

    exported = "student"

    def __init__(self, backbone: nn.Module, settings: DenseClSettings) -> None:
        super().__init__()
        s = self.settings = settings
        jitter = Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, probability=0.8)  # MoCo v2's
        view = View(s.global_size, s.global_scale, jitter=jitter, gray=0.2, blur=0.5, interpolation=s.interpolation)
        self.view_spec = ViewSpec(views=(view, view))
        channels = feature_shape(backbone, s.global_size, "method.global_size")[0]
        sizes = channels, s.projector_hidden, s.feature_dim
        self.student = nn.ModuleDict(
            {
                "backbone": backbone,
                "projector": pooled_projector(*sizes),
                "dense_projector": pooled_projector(*sizes, partial(nn.Conv2d, kernel_size=1)),
            }
        )
        self.teacher = nn.ModuleDict({key: frozen_copy(module) for key, module in self.student.items()})
        self.queue: Tensor  # (K, C), keys of unit length
        self.dense_queue: Tensor  # (K, C), the pooled dense embeddings of the same images, of unit length
        self.queue_start: Tensor  # where the oldest is
        for name in ("queue", "dense_queue"):
            self.register_buffer(name, F.normalize(torch.randn(s.queue, s.feature_dim), dim=1))
        self.register_buffer("queue_start", torch.zeros((), dtype=torch.long))
        self.shuffles = any(batch_norms(self.teacher))

    def begin_step(self, momentum: float, epoch: float) -> None:
        move_toward(self.teacher, self.student, momentum)

    def forward(self, views: Sequence[Views]) -> tuple[Tensor, Logs]:
        (pair,) = views
        with record_function("student"):
            query, cells, features = self.embed(self.student, pair.pixels[QUERY])
        with record_function("teacher"), torch.no_grad():
            embed = partial(self.embed, self.teacher)
            pixels = pair.pixels[KEY]
            key, key_cells, key_features = shuffled(self.teacher, pixels, embed, "") if self.shuffles else embed(pixels)
        with record_function("loss"), torch.autocast(query.device.type, enabled=False):
            with torch.no_grad():
                nearest = (features @ key_features.mT).argmax(-1)  # (B, N)
            found = self.loss(query, cells, key, key_cells, nearest)
            self.enqueue(key, unit(key_cells.mean(1)))
            return found

    def embed(self, network: nn.ModuleDict, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, S, S) -> the embedding (B, C), the cells' (B, N, C) and their features (B, N, F), of unit length."""
        maps = feature_map(network["backbone"], pixels)  # (B, F, H, W)
        dense = network["dense_projector"](maps)  # (B, C, H, W)
        cells, features = (unit(x.flatten(2).transpose(1, 2)) for x in (dense, maps.detach()))
        return unit(network["projector"](maps.mean((-2, -1)))), cells, features

    def loss(
        self, query: Tensor, cells: Tensor, key: Tensor, key_cells: Tensor, nearest: Tensor
    ) -> tuple[Tensor, Logs]:
        """Eq. 3: the contrastive loss of the image (Eq. 1) and the mean of those of its cells (Eq. 2).

        Args:
            query, key: (B, C) of unit length.
            cells, key_cells: (B, N, C) of unit length.
            nearest: the key's cell that matches each of the query's, (B, N).
        """
        s = self.settings
        matched = key_cells.gather(1, nearest.unsqueeze(2).expand(-1, -1, key_cells.shape[2]))  # (B, N, C)
        total, cosines = query.new_zeros(()), []
        pairs = ((1 - s.dense_weight, query, key, self.queue), (s.dense_weight, cells, matched, self.dense_queue))
        for weight, one, other, queue in pairs:
            positive = (one * other).sum(-1)
            negative = one @ queue.clone().T  # the queue itself changes before the backward pass
            total = total + weight * losses.queue_contrast(positive / s.temperature, negative / s.temperature).mean()
            cosines += [positive.detach().mean(), negative.detach().mean()]
        names = ("positive_cosine", "negative_cosine", "dense_positive_cosine", "dense_negative_cosine")
        return total, dict(zip(names, cosines, strict=True)) | {"embedding_spread": embedding_spread(key_cells)}

    @torch.no_grad()
    def enqueue(self, key: Tensor, dense_key: Tensor) -> None:
        """Enqueue the keys of every process, replacing the oldest."""
        size = len(self.queue)
        new, dense = (gather_batch(one)[-size:] for one in (key, dense_key))
        places = advance(self.queue_start, len(new), size)
        self.queue[places], self.dense_queue[places] = new.to(self.queue.dtype), dense.to(self.queue.dtype)
