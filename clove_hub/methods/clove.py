"""CLoVE: contextualized local visual embeddings (Silva, Pedrini, Ramirez Rivera; ICCV Workshops 2023).

The student sees every view, and the cells of its feature map attend to each other. Each of these contextual embeddings
is pulled toward the teacher's local embedding of the cell that shows the same place in another view, and pushed away
from the cells of that view that show other places. Where the paper and the released code differ, the settings offer
both and the default is marked.

Two processes compute what one does up to rounding. The queue of `inter` and `inter_avg` holds the embeddings of all
processes, but which cells of an image go in is drawn at random.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from clove_hub import losses
from clove_hub.backbones import feature_map, feature_shape
from clove_hub.geometry import Grid, match_cells
from clove_hub.heads import ContextualAttention, dense_projector
from clove_hub.views import Interpolation, Views, ViewSpec

from .base import Logs, advance, byol_views, embedding_spread, frozen_copy, gather_batch, move_toward, unit

Attention = Literal["normalized", "standard"]
Loss = Literal["ranking", "per_pair", "l2"]
Negatives = Literal["intra", "inter", "inter_avg"]


@dataclass(frozen=True)
class CloveSettings:
    """Settings of CLoVE. Defaults are those of the 200 and 400 epoch ImageNet runs."""

    global_views: int = 2
    """Large views, seen by student and teacher."""
    global_size: int = 224
    """Side of a large view in pixels."""
    global_scale: tuple[float, float] = (0.2, 1.0)
    """Fraction of the image's area that a large view covers. (0.24, 1) for 50 and 100 epochs."""
    local_views: int = 6
    """Small views, seen only by the student."""
    local_size: int = 96
    """Side of a small view in pixels."""
    local_scale: tuple[float, float] = (0.08, 0.3)
    """Fraction of the image's area that a small view covers."""
    interpolation: Interpolation = "bicubic"
    """Interpolation of the crops."""
    projector_hidden: int = 4096
    """Channels of the projector's hidden layers."""
    feature_dim: int = 256
    """Channels of an embedding."""
    attention: Attention = "normalized"
    """`normalized`: the paper's NMHSA. `standard`: what the released weights were trained with."""
    attention_heads: int = 8
    """Attention heads; a divisor of `feature_dim`."""
    attention_temperature: float = 0.2
    """Temperature of the normalized attention; the paper does not give it, and the released code has it as an unused
    option."""
    match_distance: float = 0.7
    """Cells match if their centers are closer than this, in units of the larger cell's diagonal (T_pos, Table 11)."""
    loss: Loss = "ranking"
    """`ranking`: as the released code averages it. `per_pair`: Eq. 2 literally. `l2`: BYOL's regression (Table 8)."""
    negatives: Negatives = "intra"
    """Where negatives come from (Table 10): the matched view's other cells, a queue of random local embeddings of
    other images (`inter`), or a queue of their pooled maps (`inter_avg`)."""
    hard_negatives: int = 10
    """Number of a cell's hardest negatives to use; the very hardest is dropped."""
    positive_weight: float = 2.0
    """Lambda in Eq. 2."""
    margin: float = 100.0
    """Mu in Eq. 2."""
    queue: int = 16384
    """Length of the queue of `inter` and `inter_avg`."""

    def __post_init__(self) -> None:
        for key, allowed in (("attention", Attention), ("loss", Loss), ("negatives", Negatives)):
            if getattr(self, key) not in get_args(allowed):
                raise ValueError(f"method.{key}={getattr(self, key)!r}: choose one of {', '.join(get_args(allowed))}")
        for key, least in (("global_views", 1), ("local_views", 0), ("hard_negatives", 2), ("queue", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"method.{key}={getattr(self, key)}: must be at least {least}")
        for key in ("attention_temperature", "match_distance"):
            if not getattr(self, key) > 0:
                raise ValueError(f"method.{key}={getattr(self, key)}: must be above 0")
        if self.global_views == 1 and self.local_views == 0:
            raise ValueError(
                "method.global_views=1 with method.local_views=0 leaves no second view to compare with: "
                "choose at least two views"
            )


class Clove(nn.Module):
    """CLoVE around a timm backbone.

    Raises:
        ValueError: a feature map has fewer cells than `hard_negatives`, or the backbone cannot take the views.
    """

    exported = "student"

    def __init__(self, backbone: nn.Module, settings: CloveSettings) -> None:
        super().__init__()
        s = self.settings = settings
        self.view_spec = view_spec(s)

        channels, *grid = feature_shape(backbone, s.global_size, "method.global_size")
        if s.local_views:
            feature_shape(backbone, s.local_size, "method.local_size")  # the backbone may refuse the size
        if s.loss != "l2" and s.negatives == "intra" and math.prod(grid) < s.hard_negatives:
            raise ValueError(
                f"a global view of {s.global_size} pixels gives a feature map of {grid[0]}x{grid[1]} = "
                f"{math.prod(grid)} cells, fewer than method.hard_negatives={s.hard_negatives}: "
                "raise method.global_size or lower method.hard_negatives"
            )

        temperature = s.attention_temperature if s.attention == "normalized" else None
        self.student = nn.ModuleDict(
            {
                "backbone": backbone,
                "projector": dense_projector(channels, s.projector_hidden, s.feature_dim),
                "predictor": ContextualAttention(s.feature_dim, s.attention_heads, temperature),
            }
        )
        self.teacher = nn.ModuleDict({key: frozen_copy(self.student[key]) for key in ("backbone", "projector")})
        large = range(s.global_views)
        others = torch.tensor([[t for t in large if t != v] for v in large], dtype=torch.long)
        self.other_views: Tensor  # (T, T - 1): the teacher views that each global view meets
        self.register_buffer("other_views", others, persistent=False)
        self.queue: Tensor  # (K, C), of unit length, and the place of its oldest entry; with `inter` and `inter_avg`
        self.queue_start: Tensor
        if s.negatives != "intra":
            self.register_buffer("queue", F.normalize(torch.randn(s.queue, s.feature_dim), dim=1))
            self.register_buffer("queue_start", torch.zeros((), dtype=torch.long))

    def begin_step(self, momentum: float, epoch: float) -> None:
        move_toward(self.teacher, self.student, momentum)

    def forward(self, views: Sequence[Views]) -> tuple[Tensor, Logs]:
        with record_function("student"):
            predictions = [self.embed(group.pixels, context=True) for group in views]  # each (V, B, N, C) and its grid
        with record_function("teacher"), torch.no_grad():
            target, grid = self.embed(views[0].pixels[: self.settings.global_views])  # (T, B, N, C)
        with record_function("loss"), torch.autocast(target.device.type, enabled=False):
            loss, logs = self.loss(views, predictions, target, grid)
            if self.settings.negatives != "intra":
                self.enqueue(target)
        return loss, logs

    def embed(self, pixels: Tensor, *, context: bool = False) -> tuple[Tensor, Grid]:
        """Cells of unit length and their grid: (V, B, 3, S, S) -> (V, B, N, C).

        The teacher's local embeddings F of the paper; with `context` the student's contextual ones, C.
        """
        network = self.student if context else self.teacher
        local = network["projector"](feature_map(network["backbone"], pixels.flatten(0, 1)))
        cells = local.flatten(2).transpose(1, 2)  # (V * B, N, C)
        if context:
            cells = network["predictor"](cells)
        return unit(cells).view(*pixels.shape[:2], *cells.shape[1:]), (local.shape[2], local.shape[3])

    def loss(
        self, views: Sequence[Views], predictions: Sequence[tuple[Tensor, Grid]], target: Tensor, grid: Grid
    ) -> tuple[Tensor, Logs]:
        """Mean loss over the batch and over all pairs of a student view and another teacher view."""
        s = self.settings
        terms, positives, negatives, matched = [], [], [], []
        for query, query_grid, boxes, keys, key_boxes in self.pairings(views, predictions, target):
            similarity = losses.cosine(query, keys)  # (V, R, B, Nq, Nk), R teacher views for each student view
            match = match_cells(boxes.unsqueeze(1), query_grid, key_boxes, grid, s.match_distance)
            matches = match.sum(-1, dtype=torch.float32)  # (V, R, B, Nq), how many keys match each query
            positive, negative, has = self.cosines(query, similarity, match, matches)
            terms.append(self.terms(similarity, match, matches, positive, negative, has).flatten())
            positives.append(positive.detach().flatten())
            negatives.append(losses.row_mean(negative.detach(), has).flatten())
            matched.append((matches > 0).float().flatten())
        logs = {
            "positive_cosine": torch.cat(positives).mean(),
            "negative_cosine": torch.cat(negatives).mean(),
            "matched_cells": torch.cat(matched).mean(),
            "embedding_spread": embedding_spread(target),
        }
        return torch.cat(terms).mean(), logs

    def pairings(
        self, views: Sequence[Views], predictions: Sequence[tuple[Tensor, Grid]], target: Tensor
    ) -> Iterator[tuple[Tensor, Grid, Tensor, Tensor, Tensor]]:
        """The pairs of views: V predictions, their grid and boxes; for each, the R teacher views (V or 1, R, ...), boxes.

        A global view is paired with the other global views, a local one with all of them. The two are distinguished
        even if they have the same size and so share a group.
        """
        count = len(target)
        target_boxes = views[0].boxes[:count]
        for i, (group, (prediction, grid)) in enumerate(zip(views, predictions, strict=True)):
            split = count if i == 0 else 0
            # Whole tensors stay whole: the gradient of a slice is a copy.
            large = prediction if split == len(prediction) else prediction[:split]
            small = prediction if split == 0 else prediction[split:]
            if split > 1:
                yield large, grid, group.boxes[:count], target[self.other_views], target_boxes[self.other_views]
            if len(prediction) > split:
                yield small, grid, group.boxes[split:], target[None], target_boxes[None]

    def cosines(
        self, query: Tensor, similarity: Tensor, match: Tensor, matches: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean cosines of pairs and of negatives.

        Returns:
            Of the matched pairs (V, R, B), of each query to its hard negatives (V, R, B, Nq), and whether it has any.
        """
        s = self.settings
        if s.negatives == "intra":
            count = min(s.hard_negatives, match.shape[-1])
            total, top = losses.matched_and_hardest(similarity, match, count)
            found = (match.shape[-1] - matches).clamp(max=count)
        else:
            total = losses.matched_sum(similarity, match)
            queue = self.queue.clone()  # the queue itself changes before the backward pass
            top = (query.unsqueeze(1) @ queue.T).topk(min(s.hard_negatives, s.queue), dim=-1).values
            found = torch.full_like(matches, top.shape[-1])
        return losses.matched_mean(total, matches), *losses.without_hardest(top, found)

    def terms(
        self, similarity: Tensor, match: Tensor, matches: Tensor, positive: Tensor, negative: Tensor, has: Tensor
    ) -> Tensor:
        """The chosen loss for each view, teacher view and image: (V, R, B)."""
        s = self.settings
        weights = {"positive_weight": s.positive_weight, "margin": s.margin}
        if s.loss == "l2":
            return losses.l2_loss(positive, matches)
        if s.loss == "per_pair":
            return losses.ranking_loss_per_pair(similarity, match, negative, **weights)
        return losses.ranking_loss(positive, negative, has, **weights)

    @torch.no_grad()
    def enqueue(self, target: Tensor) -> None:
        """Enqueue one embedding of each image and teacher view of every process, replacing the oldest."""
        cells = target.flatten(0, 1)  # (T * B, N, C)
        if self.settings.negatives == "inter_avg":
            new = F.normalize(cells.mean(1), dim=-1)
        else:
            chosen = torch.randint(cells.shape[1], (len(cells), 1, 1), device=cells.device)
            new = cells.gather(1, chosen.expand(-1, 1, cells.shape[2])).squeeze(1)  # (T * B, C)
        new = gather_batch(new)[-len(self.queue) :]
        self.queue[advance(self.queue_start, len(new), len(self.queue))] = new.to(self.queue.dtype)


def view_spec(settings: CloveSettings) -> ViewSpec:
    """BYOL's two large views, their rules alternating where there are more than two, and small ones."""
    s = settings
    pair = byol_views(s.global_size, s.global_scale, s.interpolation)
    local = replace(pair[0], size=s.local_size, scale=s.local_scale, blur=0.5)
    return ViewSpec(views=tuple(pair[i % 2] for i in range(s.global_views)) + (local,) * s.local_views)
