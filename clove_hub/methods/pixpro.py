"""PixPro: pixel-level consistency with pixel propagation (Xie, Lin, Zhang, Cao, Lin, Hu; CVPR 2021).

The student's cells, each smoothed by the cells of its own map that resemble it, are pulled toward the teacher's cells
that show the same place in the other view. There are no negatives. An instance branch on pooled maps can be added
(section 3.3).

Two processes compute what one does up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from clove_hub import losses
from clove_hub.backbones import feature_map, feature_shape
from clove_hub.geometry import Grid, match_cells
from clove_hub.heads import PixelPropagation, dense_projector
from clove_hub.views import Interpolation, Views, ViewSpec

from .base import Logs, byol_views, embedding_spread, frozen_copy, move_toward, unit


@dataclass(frozen=True)
class PixproSettings:
    """Settings of PixPro. Defaults are those of the released ImageNet runs."""

    global_size: int = 224
    """Side of the two views in pixels."""
    global_scale: tuple[float, float] = (0.08, 1.0)
    """Fraction of the image's area that a view covers."""
    interpolation: Interpolation = "bilinear"
    """Interpolation of the crops."""
    projector_hidden: int = 4096
    """Channels of the projector's hidden layers."""
    feature_dim: int = 256
    """Channels of an embedding."""
    sharpness: float = 2.0
    """Exponent of the similarity in the propagation (gamma of Eq. 3)."""
    match_distance: float = 0.7
    """Cells match if their centers are closer than this, in units of the larger cell's diagonal (T in Eq. 1)."""
    instance_weight: float = 0.0
    """Weight of the instance branch (alpha in Eq. 7); 0 disables it, as in the released runs."""

    def __post_init__(self) -> None:
        for key in ("sharpness", "match_distance"):
            if not getattr(self, key) > 0:
                raise ValueError(f"method.{key}={getattr(self, key)}: must be above 0")
        if self.instance_weight < 0:
            raise ValueError(f"method.instance_weight={self.instance_weight}: must be at least 0")


class Pixpro(nn.Module):
    """PixPro around a timm backbone.

    Raises:
        ValueError: the backbone cannot take the views.
    """

    exported = "student"

    def __init__(self, backbone: nn.Module, settings: PixproSettings) -> None:
        super().__init__()
        s = self.settings = settings
        self.view_spec = ViewSpec(views=byol_views(s.global_size, s.global_scale, s.interpolation))
        channels = feature_shape(backbone, s.global_size, "method.global_size")[0]
        self.student = nn.ModuleDict(
            {
                "backbone": backbone,
                "projector": dense_projector(channels, s.projector_hidden, s.feature_dim, biased=True),
                "predictor": PixelPropagation(s.feature_dim, s.sharpness),
            }
        )
        taught = ["backbone", "projector"]
        if s.instance_weight:
            self.student["instance_projector"] = dense_projector(
                channels, s.projector_hidden, s.feature_dim, biased=True
            )
            self.student["instance_predictor"] = dense_projector(
                s.feature_dim, s.projector_hidden, s.feature_dim, biased=True
            )
            taught.append("instance_projector")
        self.teacher = nn.ModuleDict({key: frozen_copy(self.student[key]) for key in taught})

    def begin_step(self, momentum: float, epoch: float) -> None:
        move_toward(self.teacher, self.student, momentum)

    def forward(self, views: Sequence[Views]) -> tuple[Tensor, Logs]:
        (group,) = views  # two views of one size
        instance = self.settings.instance_weight > 0
        # One view after the other, as in the released code: each has its own statistics in batch norm.
        with record_function("student"):
            maps = [feature_map(self.student["backbone"], pixels) for pixels in group.pixels]  # each (B, F, H, W)
            projected = [cells(self.student["projector"](x)) for x in maps]
            prediction = torch.stack([unit(self.student["predictor"](x)) for x in projected])  # (2, B, N, C)
            if instance:
                instances = [self.student["instance_predictor"](self.student["instance_projector"](x)) for x in maps]
                one = unit(torch.stack(instances).mean((-2, -1)))  # (2, B, C)
        with record_function("teacher"), torch.no_grad():
            maps = [feature_map(self.teacher["backbone"], pixels) for pixels in group.pixels]
            target = unit(torch.stack([cells(self.teacher["projector"](x)) for x in maps]))
            if instance:
                other = unit(torch.stack([self.teacher["instance_projector"](x) for x in maps]).mean((-2, -1)))
        with record_function("loss"), torch.autocast(target.device.type, enabled=False):
            grid = (maps[0].shape[2], maps[0].shape[3])
            loss, logs = self.loss(group.boxes, prediction, target, grid)
            if instance:
                cosine = (one * other.flip(0)).sum(-1)  # (2, B)
                loss = loss - 2 * self.settings.instance_weight * cosine.sum(0).mean()
                logs["instance_cosine"] = cosine.detach().mean()
        return loss, logs

    def loss(self, boxes: Tensor, prediction: Tensor, target: Tensor, grid: Grid) -> tuple[Tensor, Logs]:
        """Eq. 5 in both directions, summed; the mean over the batch.

        Args:
            boxes: (2, B, 4).
            prediction: the student's cells, of unit length (2, B, N, C).
            target: the teacher's.
            grid: of both.
        """
        keys, key_boxes = target.flip(0).unsqueeze(1), boxes.flip(0).unsqueeze(1)  # (2, 1, B, N, C), (2, 1, B, 4)
        match = match_cells(boxes.unsqueeze(1), grid, key_boxes, grid, self.settings.match_distance)
        matches = match.sum(-1, dtype=torch.float32)  # (2, 1, B, N), how many keys match each cell
        total = losses.matched_sum(losses.cosine(prediction, keys), match)  # (2, 1, B)
        positive = losses.matched_mean(total, matches)
        logs = {
            "positive_cosine": positive.detach().mean(),
            "matched_cells": (matches > 0).float().mean(),
            "embedding_spread": embedding_spread(target),
        }
        return -2 * positive.sum(0).mean(), logs


def cells(maps: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C)."""
    return maps.flatten(2).transpose(1, 2)
