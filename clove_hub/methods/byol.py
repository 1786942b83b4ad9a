"""BYOL: bootstrap your own latent (Grill et al., NeurIPS 2020, arXiv:2006.07733).

From one view of an image, the student predicts the teacher's projection of another. There are no negatives: the
predictor and the teacher's moving average keep the embeddings from collapsing. Written from the paper.

Two processes compute what one does up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from clove_hub.backbones import feature_map, feature_shape
from clove_hub.heads import byol_mlp
from clove_hub.views import Interpolation, Views, ViewSpec

from .base import Logs, byol_views, embedding_spread, frozen_copy, move_toward, unit


@dataclass(frozen=True)
class ByolSettings:
    """Settings of BYOL. Defaults are the paper's."""

    global_size: int = 224
    """Side of the two views in pixels."""
    global_scale: tuple[float, float] = (0.08, 1.0)
    """Fraction of the image's area that a view covers."""
    interpolation: Interpolation = "bicubic"
    """Interpolation of the crops."""
    projector_hidden: int = 4096
    """Width of the hidden layer of projector and predictor."""
    feature_dim: int = 256
    """Length of an embedding."""


class Byol(nn.Module):
    """BYOL around a timm backbone, whose feature map is pooled by its mean.

    Raises:
        ValueError: the backbone cannot take the views.
    """

    exported = "student"

    def __init__(self, backbone: nn.Module, settings: ByolSettings) -> None:
        super().__init__()
        s = self.settings = settings
        self.view_spec = ViewSpec(views=byol_views(s.global_size, s.global_scale, s.interpolation))
        channels = feature_shape(backbone, s.global_size, "method.global_size")[0]
        self.student = nn.ModuleDict(
            {
                "backbone": backbone,
                "projector": byol_mlp(channels, s.projector_hidden, s.feature_dim),
                "predictor": byol_mlp(s.feature_dim, s.projector_hidden, s.feature_dim),
            }
        )
        self.teacher = nn.ModuleDict({key: frozen_copy(self.student[key]) for key in ("backbone", "projector")})

    def begin_step(self, momentum: float, epoch: float) -> None:
        move_toward(self.teacher, self.student, momentum)

    def forward(self, views: Sequence[Views]) -> tuple[Tensor, Logs]:
        (pair,) = views
        # One view after the other: each has its own statistics in batch norm.
        with record_function("student"):
            predicted = [self.student["predictor"](embed(self.student, pixels)) for pixels in pair.pixels]
        with record_function("teacher"), torch.no_grad():
            target = [embed(self.teacher, pixels) for pixels in pair.pixels]
        with record_function("loss"), torch.autocast(pair.pixels.device.type, enabled=False):
            return self.loss(unit(torch.stack(predicted)), unit(torch.stack(target)))

    def loss(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Logs]:
        """Eq. 2 in both directions, summed; the mean over the batch: twice (2, B, C) of unit length."""
        cosine = (prediction * target.flip(0)).sum(-1)  # (2, B)
        logs = {"positive_cosine": cosine.detach().mean(), "embedding_spread": embedding_spread(target)}
        return (2 - 2 * cosine).sum(0).mean(), logs


def embed(network: nn.ModuleDict, pixels: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, C)."""
    embedded: Tensor = network["projector"](feature_map(network["backbone"], pixels).mean((-2, -1)))
    return embedded
