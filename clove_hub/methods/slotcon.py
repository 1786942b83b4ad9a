"""SlotCon: joint semantic grouping and contrast of slots (Wen et al., NeurIPS 2022, arXiv:2205.15288).

The cells of a feature map are assigned to learned prototypes. Student and teacher must agree on the assignment in the
region that two overlapping crops share. The slot that a prototype pools from one crop must match that of the same
prototype in the other crop, among the slots of all images.

Two processes compute what one does up to rounding: the slots of all images of a forward pass are negatives, and the
center is theirs, on whichever process they are. Micro-batches of a step have negatives of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from clove_hub import losses
from clove_hub.backbones import feature_map, feature_shape
from clove_hub.batch_norm import processes
from clove_hub.geometry import resample, shared_region
from clove_hub.heads import Prototypes, SlotPredictor, pool_slots, slotcon_projector
from clove_hub.views import Interpolation, Overlap, Views, ViewSpec

from .base import (
    Logs,
    byol_views,
    embedding_spread,
    frozen_copy,
    full_precision,
    gather_batch,
    move_toward,
    own_share,
    unit,
)


@dataclass(frozen=True)
class SlotConSettings:
    """Settings of SlotCon. Defaults are those of the COCO run."""

    global_size: int = 224
    """Side of a view in pixels."""
    global_scale: tuple[float, float] = (0.08, 1.0)
    """Fraction of the image's area that a view covers."""
    overlap: float = 0.01
    """Minimum fraction of the second view's area that overlaps the first."""
    interpolation: Interpolation = "bicubic"
    """Interpolation of the crops."""
    projector_hidden: int = 4096
    """Channels of the projector's hidden layers."""
    feature_dim: int = 256
    """Channels of an embedding and of a slot."""
    prototypes: int = 256
    """Number of prototypes: 256 on COCO, 2048 on ImageNet."""
    student_temperature: float = 0.1
    """Temperature of the student's assignments."""
    teacher_temperature: float = 0.07
    """Temperature of the teacher's assignments and of the weights of cells in slots."""
    center_momentum: float = 0.9
    """Momentum of the moving average of the prototypes' scores."""
    contrast_temperature: float = 0.2
    """Temperature of the slot loss."""
    group_loss_weight: float = 0.5
    """Weight of the grouping loss; the slot loss has 1 minus it."""

    def __post_init__(self) -> None:
        for key in ("student_temperature", "teacher_temperature", "contrast_temperature"):
            if not getattr(self, key) > 0:
                raise ValueError(f"method.{key}={getattr(self, key)}: must be above 0")
        for key in ("overlap", "center_momentum", "group_loss_weight"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"method.{key}={getattr(self, key)}: must be between 0 and 1")
        if self.prototypes < 2:
            raise ValueError(f"method.prototypes={self.prototypes}: must be at least 2")


class Slots(NamedTuple):
    """The slots of two views, for the winning prototype of each cell of the teacher's view: N cells, N slots.

    Their number does not depend on the data; a prototype that wins several cells occurs several times but counts once.
    """

    query: Tensor
    """The student's in one view, (B, N, C)."""
    key: Tensor
    """The teacher's in the other, (B, N, C) of unit length."""
    contrasted: Tensor
    """Boolean (B, N): those whose prototype wins a cell in both views."""
    active: Tensor
    """Boolean (B, N): those that count as keys."""


class SlotCon(nn.Module):
    """SlotCon around a timm backbone.

    Raises:
        ValueError: the backbone cannot take the views.
    """

    exported = "teacher"

    def __init__(self, backbone: nn.Module, settings: SlotConSettings) -> None:
        super().__init__()
        s = self.settings = settings
        first, second = byol_views(s.global_size, s.global_scale, s.interpolation)
        overlap = Overlap(view=0, share=s.overlap) if s.overlap else None
        self.view_spec = ViewSpec(views=(first, replace(second, overlap=overlap)), boxes="edges")
        channels, *_ = feature_shape(backbone, s.global_size, "method.global_size")
        self.student = nn.ModuleDict(
            {
                "backbone": backbone,
                "projector": slotcon_projector(channels, s.projector_hidden, s.feature_dim),
                "prototypes": Prototypes(s.prototypes, s.feature_dim),
                "predictor": SlotPredictor(s.feature_dim, s.projector_hidden),
            }
        )
        taught = ("backbone", "projector", "prototypes")
        self.teacher = nn.ModuleDict({key: frozen_copy(self.student[key]) for key in taught})
        self.center: Tensor  # (1, K), as in the released checkpoints
        self.register_buffer("center", torch.zeros(1, s.prototypes))

    def begin_step(self, momentum: float, epoch: float) -> None:
        move_toward(self.teacher, self.student, momentum)

    def forward(self, views: Sequence[Views]) -> tuple[Tensor, Logs]:
        (pair,) = views
        # One view after the other, as in the released code: each has its own statistics in batch norm.
        with record_function("student"):
            students = [embed(self.student, pixels) for pixels in pair.pixels]  # each (B, C, H, W)
        with record_function("teacher"), torch.no_grad():
            teachers = [embed(self.teacher, pixels) for pixels in pair.pixels]
        with record_function("grouping"), torch.autocast(pair.pixels.device.type, enabled=False):
            student = [self.student["prototypes"](full_precision(x)) for x in students]  # scores, each (B, K, H, W)
            with torch.no_grad():
                teacher = [self.teacher["prototypes"](full_precision(x)) for x in teachers]
            regions, shared = shared_region(pair.boxes, pair.boxes.flip(0))  # (2, B, 4), (2, B)
            group = self.group_loss(student, teacher, regions, shared[0])
            self.update_center(teacher)
            slots = [self.slots(students[q], student[q], teachers[k], teacher[k]) for q, k in ((0, 1), (1, 0))]
        with record_function("predictor"):
            predicted = [self.student["predictor"](x.query.flatten(0, 1), x.contrasted.flatten()) for x in slots]
        with record_function("contrast"), torch.autocast(pair.pixels.device.type, enabled=False):
            slot = torch.stack([self.slot_loss(*both) for both in zip(predicted, slots, strict=True)]).sum()
            loss = self.settings.group_loss_weight * group + (1 - self.settings.group_loss_weight) * slot
        logs = {
            "group_loss": group.detach(),
            "slot_loss": slot.detach(),
            # Grouping collapses into few prototypes, or into one for each place.
            "active_slots": torch.stack([x.active for x in slots]).sum(-1, dtype=torch.float32).mean(),
            "contrasted_slots": torch.stack([x.contrasted for x in slots]).sum(-1, dtype=torch.float32).mean(),
            "used_prototypes": used(torch.stack([winners(scores) for scores in teacher]), self.settings.prototypes),
            "embedding_spread": embedding_spread(unit(torch.stack(teachers).movedim(2, -1))),
        }
        return loss, logs

    def group_loss(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], regions: Tensor, shared: Tensor
    ) -> Tensor:
        """Agreement on the region that both views show; the sum of the two directions.

        Args:
            student, teacher: scores (B, K, H, W) of each of the two views.
            regions: what each view shares with the other, in its own frame, (2, B, 4).
            shared: boolean (B,), false for images whose views do not overlap, which are ignored.
        """
        s, total = self.settings, torch.zeros((), device=regions.device)
        for query, key in ((0, 1), (1, 0)):
            terms = losses.grouping_loss(
                resample(student[query], regions[query]).movedim(1, -1),  # (B, H, W, K)
                resample(teacher[key], regions[key]).movedim(1, -1),
                self.center[0],
                student_temperature=s.student_temperature,
                teacher_temperature=s.teacher_temperature,
            ).mean((1, 2))
            total = total + mean_over_processes(terms, shared)
        return total

    def slots(self, maps: Tensor, scores: Tensor, key_maps: Tensor, key_scores: Tensor) -> Slots:
        """The student's slots of one view and the teacher's of the other.

        Args:
            maps, key_maps: (B, C, H, W).
            scores, key_scores: (B, K, H, W).
        """
        found, chosen = winners(scores), winners(key_scores)  # (B, N)
        active = ~(chosen.unsqueeze(2) == chosen.unsqueeze(1)).tril(-1).any(2)  # not named by an earlier cell
        contrasted = active & (chosen.unsqueeze(2) == found.unsqueeze(1)).any(2)
        temperature = self.settings.teacher_temperature  # of the student's too, as in the released code
        query = pool_slots(full_precision(maps), scores, chosen, temperature)
        with torch.no_grad():
            key = unit(pool_slots(full_precision(key_maps), key_scores, chosen, temperature))
        return Slots(query, key, contrasted, active)

    def slot_loss(self, predicted: Tensor, slots: Slots) -> Tensor:
        """Contrast of the predicted slots (B * N, C) with the teacher's of all images of all processes."""
        keys, active = gather_batch(slots.key.flatten(0, 1)), gather_batch(slots.active.flatten())
        positive = own_share(torch.arange(len(keys), device=keys.device))
        terms = losses.slot_contrast(unit(predicted), keys, positive, active, self.settings.contrast_temperature)
        return mean_over_processes(terms, slots.contrasted.flatten())

    @torch.no_grad()
    def update_center(self, scores: Sequence[Tensor]) -> None:
        """Moves the center toward the mean of the teacher's scores over all cells, views and processes."""
        mean = gather_batch(torch.stack([one.mean((0, 2, 3)) for one in scores])).mean(0)  # (K,)
        self.center.lerp_(mean.to(self.center.dtype), 1 - self.settings.center_momentum)


def embed(network: nn.ModuleDict, pixels: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, C, H, W)."""
    maps: Tensor = network["projector"](feature_map(network["backbone"], pixels))
    return maps


def winners(scores: Tensor) -> Tensor:
    """The number of each cell's best prototype: (B, K, H, W) -> (B, H * W)."""
    return scores.argmax(1).flatten(1)


def used(winners: Tensor, prototypes: int) -> Tensor:
    """The fraction of prototypes that win a cell of some image."""
    found = torch.zeros(prototypes, device=winners.device)
    return found.scatter_(0, winners.flatten(), 1.0).mean()


def mean_over_processes(values: Tensor, counts: Tensor) -> Tensor:
    """The mean of those `values` that count among all processes', as this one's share: (N,), boolean (N,) -> scalar.

    The mean of the processes' shares is the mean of all, however many each has; zero where none counts. (The released
    code averages the means of the processes.)
    """
    total = gather_batch(counts.sum(dtype=values.dtype).unsqueeze(0)).mean()
    return values.where(counts, 0).sum() / total.clamp(min=1 / processes())
