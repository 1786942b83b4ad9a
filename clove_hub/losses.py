"""The losses, as pure functions of similarities and matches.

A similarity is the cosine between a query cell (student) and a key cell (teacher). Shapes keep every leading
dimension (views, targets, batch), so that all terms of a step are one computation: ..., Nq query cells, Nk key cells.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# The released code divides the sum over matched pairs by their number plus this, so that an image whose views do not
# overlap contributes a zero instead of a NaN.
EMPTY = 1e-6


def cosine(query: Tensor, key: Tensor) -> Tensor:
    """Similarities of unit-length cells: (V, B, Nq, C) and (V or 1, R, B, Nk, C) -> (V, R, B, Nq, Nk).

    Views and keys are folded into the rows and columns of one product for each image, as products of a few cells by
    a few cells are slow on every device.
    """
    views, batch, queries, channels = query.shape
    _, others, _, keys, _ = key.shape
    if key.shape[0] == 1:  # all views meet the same keys
        rows = query.transpose(0, 1).reshape(batch, views * queries, channels)
        columns = key[0].transpose(0, 1).reshape(batch, others * keys, channels)
        product = (rows @ columns.mT).view(batch, views, queries, others, keys)
        return product.permute(1, 3, 0, 2, 4)
    rows = query.reshape(views * batch, queries, channels)
    columns = key.transpose(1, 2).reshape(views * batch, others * keys, channels)
    product = (rows @ columns.mT).view(views, batch, queries, others, keys)
    return product.permute(0, 3, 1, 2, 4)


def matched_mean(total: Tensor, matches: Tensor) -> Tensor:
    """The sum over the matched pairs of each image (...) and the number of each query's matches (..., Nq) -> the mean.

    Zero where nothing matches.
    """
    # The numbers are float32 whatever the values are, as in the released code. It changes a loss by only 1e-9, but
    # a float64 run leaves the recorded trajectory within four steps without it.
    assert matches.dtype == torch.float32
    return total / (matches.sum(-1) + EMPTY)


def matched_sum(values: Tensor, match: Tensor) -> Tensor:
    """Sum of `values` over the matched pairs of each image: (..., Nq, Nk) -> (...)."""
    return torch.where(match, values, 0).sum((-2, -1))


def matched_and_hardest(similarity: Tensor, match: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`matched_sum` and the similarity of each query to its `count` most similar unmatched keys.

    (..., Nq, Nk) -> (...) and (..., Nq, count), descending, zero where a query has fewer. One operation, because its
    gradient is one: autograd's would spend its time on moving zeros.
    """
    result: tuple[Tensor, Tensor] = _MatchedAndHardest.apply(similarity, match, count)
    return result


class _MatchedAndHardest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, similarity: Tensor, match: Tensor, count: int) -> tuple[Tensor, Tensor]:
        kept = torch.where(match, similarity, 0)
        total = kept.sum((-2, -1))
        # Into the same memory: on a CPU fresh memory costs more than what is written to it.
        top, index = kept.copy_(similarity).masked_fill_(match, -torch.inf).topk(count, dim=-1)
        missing = torch.isneginf(top)
        ctx.save_for_backward(match, index, missing)
        return total, top.masked_fill_(missing, 0)

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, grad_top: Tensor) -> tuple[Tensor, None, None]:
        match, index, missing = ctx.saved_tensors
        gradient = torch.where(match, grad_sum[..., None, None], 0)
        return gradient.scatter_add_(-1, index, grad_top.masked_fill(missing, 0)), None, None


def without_hardest(top: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Mean similarity of each query to its hard negatives, without the very hardest (CLoVE section 3.3).

    The hardest is often the same object. A query with fewer unmatched keys than `count` averages those it has, again
    without the first; with a single one, it takes that one; with none, it has no negatives. (The released code returns
    infinity in these cases.)

    Args:
        top: (..., Nq, count), descending.
        found: how many of the `count` there are for each query, (..., Nq).

    Returns:
        The mean, (..., Nq), zero where a query has no negatives; and a boolean (..., Nq), true where it has some.
    """
    rest = top[..., 1:].sum(-1) / (found - 1).clamp(min=1)
    return torch.where(found == 1, top[..., 0], rest), found > 0


def ranking_loss(
    positive: Tensor, negative: Tensor, has_negatives: Tensor, *, positive_weight: float = 2.0, margin: float = 100.0
) -> Tensor:
    """CLoVE's loss as the released code computes it, one value for each image: (...), (..., Nq) -> (...).

    With d = -2 cos: P is the mean of d over the matched pairs, N the mean of d over the queries' hard negatives,
    and the loss is max(0, margin + positive_weight * P - N).

    Args:
        positive: mean cosine of the matched pairs (`matched_mean`).
        negative, has_negatives: of each query (`without_hardest`).
    """
    return torch.relu(margin - 2 * positive_weight * positive + 2 * row_mean(negative, has_negatives))


def row_mean(negative: Tensor, has_negatives: Tensor) -> Tensor:
    """Mean over the queries that have negatives: (..., Nq) -> (...). Zero where none has."""
    return negative.sum(-1) / has_negatives.sum(-1).clamp(min=1)


def ranking_loss_per_pair(
    similarity: Tensor, match: Tensor, negative: Tensor, *, positive_weight: float = 2.0, margin: float = 100.0
) -> Tensor:
    """CLoVE Eq. 2 taken literally: the mean over matched pairs of max(0, -weight cos+ + cos- + margin).

    cos- is the mean of the query's hard negatives. (..., Nq, Nk) and (..., Nq) -> (...); zero where nothing matches.
    """
    hinge = torch.relu(margin + negative.unsqueeze(-1) - positive_weight * similarity)  # (..., Nq, Nk)
    return matched_mean(matched_sum(hinge, match), match.sum(-1, dtype=torch.float32))


def l2_loss(positive: Tensor, matches: Tensor) -> Tensor:
    """BYOL's regression between matched unit vectors, 2 - 2 cos, averaged over pairs (CLoVE Table 8): -> (...).

    Args:
        positive: mean cosine of the matched pairs (`matched_mean`), (...).
        matches: of each query, (..., Nq); an image without matched pairs has no loss.
    """
    return torch.where(matches.sum(-1) > 0, 2 - 2 * positive, 0)


# ---- MoCo ------------------------------------------------------------------------------------------------------------


def queue_contrast(positive: Tensor, negative: Tensor) -> Tensor:
    """InfoNCE of a query with one positive and a queue of negatives (MoCo Eq. 1): (...), (..., K) -> (...).

    Both are cosines divided by the temperature.
    """
    return torch.logaddexp(negative.logsumexp(-1), positive) - positive


def neighbor_contrast(logits: Tensor, neighbors: Tensor) -> Tensor:
    """The k-NN loss of Van Gansbeke et al. 2021, section 4.3: (..., K), (..., k) -> (...).

    The mean over a query's neighbors of -log softmax, the softmax taken over the queue alone.

    Args:
        logits: cosines of the query to the queue's keys, divided by the temperature.
        neighbors: indices into the queue of the positives.
    """
    return logits.logsumexp(-1) - logits.gather(-1, neighbors).mean(-1)


# ---- SlotCon ---------------------------------------------------------------------------------------------------------


def grouping_loss(
    student: Tensor, teacher: Tensor, center: Tensor, *, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Cross-entropy of the student's assignment of cells to prototypes to the teacher's (SlotCon section 3.1).

    That of softmax(student / temperature) to softmax((teacher - center) / temperature): (..., K) -> (...).

    Args:
        student, teacher: cosines of each cell to the K prototypes.
        center: (K,), the mean of the teacher's scores of all cells.
    """
    target = ((teacher - center) / teacher_temperature).softmax(-1)
    return -(target * (student / student_temperature).log_softmax(-1)).sum(-1)


def slot_contrast(query: Tensor, keys: Tensor, positive: Tensor, active: Tensor, temperature: float) -> Tensor:
    """InfoNCE among slots (SlotCon section 3.2), times twice the temperature as in the released code: -> (M,).

    Args:
        query: predicted slots of the student, (M, C) of unit length.
        keys: the teacher's slots of all images of all processes, (N, C) of unit length.
        positive: which key each query belongs to, (M,). A query whose key does not count has an infinite loss.
        active: which keys count, boolean (N,).
        temperature: tau, of the softmax.
    """
    logits = (query @ keys.mT / temperature).masked_fill(~active, -torch.inf)
    return 2 * temperature * F.cross_entropy(logits, positive, reduction="none")
