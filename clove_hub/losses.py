"""The losses, as pure functions of similarities and matches.

A similarity is the cosine between a query cell (student) and a key cell (teacher). Shapes keep every leading
dimension (views, targets, batch), so that all terms of a step are one computation: ..., Nq query cells, Nk key cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def matched_mean(values: Tensor, match: Tensor) -> Tensor:
    """Mean of `values` over the matched pairs of each image: (..., Nq, Nk) -> (...). Zero where nothing matches."""
    # The divisor is float32 whatever the values are, as in the released code. It moves a loss by 1e-9 alone, but a
    # float64 run leaves the recorded trajectory within four steps without it.
    return (values * match).sum((-2, -1)) / (match.sum((-2, -1)) + EMPTY)


def hard_negatives(similarity: Tensor, match: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Mean similarity of each query to its hardest negatives, the very hardest left out (CLoVE section 3.3).

    Of the `count` most similar unmatched cells the first is dropped, as it is often the same object, and the others
    are averaged. A query with fewer unmatched cells averages those it has; with a single one it takes that one; with
    none it has no negatives at all. (The released code returns infinity in these cases.)

    Args:
        similarity: (..., Nq, Nk).
        match: boolean of the same shape, or None where no key can match.
        count: how many of the hardest to look at, the dropped one included; at least 2.

    Returns:
        The mean, (..., Nq), zero where a query has no negatives; and a boolean (..., Nq), true where it has some.
    """
    count = min(count, similarity.shape[-1])
    masked = similarity if match is None else similarity.masked_fill(match, -torch.inf)
    top = masked.topk(count, dim=-1).values  # (..., Nq, count), falling
    finite = top > -torch.inf
    available = finite.sum(-1, keepdim=True)  # (..., Nq, 1)
    rank = torch.arange(count, device=top.device)
    used = finite & ((rank > 0) | (available == 1))
    total = top.masked_fill(~used, 0).sum(-1)  # (..., Nq)
    return total / used.sum(-1).clamp(min=1), available[..., 0] > 0


def ranking_loss(
    similarity: Tensor,
    match: Tensor,
    negatives: Tensor,
    has_negatives: Tensor,
    *,
    positive_weight: float = 2.0,
    margin: float = 100.0,
) -> Tensor:
    """CLoVE's loss as the released code computes it, one value for each image: (..., Nq, Nk) -> (...).

    With d = -2 cos: P is the mean of d over the matched pairs, N the mean of d over the queries' hard negatives,
    and the loss is max(0, margin + positive_weight * P - N).
    """
    positive = -2 * matched_mean(similarity, match)
    rows = has_negatives.sum(-1).clamp(min=1)
    negative = -2 * (negatives * has_negatives).sum(-1) / rows
    return torch.relu(margin + positive_weight * positive - negative)


def ranking_loss_per_pair(
    similarity: Tensor,
    match: Tensor,
    negatives: Tensor,
    *,
    positive_weight: float = 2.0,
    margin: float = 100.0,
) -> Tensor:
    """CLoVE Eq. 2 taken literally: the mean over matched pairs of max(0, -weight cos+ + cos- + margin).

    cos- is the mean of the query's hard negatives. (..., Nq, Nk) and (..., Nq) -> (...); zero where nothing matches.
    """
    hinge = torch.relu(margin + negatives.unsqueeze(-1) - positive_weight * similarity)  # (..., Nq, Nk)
    return matched_mean(hinge, match)


def l2_loss(similarity: Tensor, match: Tensor) -> Tensor:
    """BYOL's regression between matched unit vectors, 2 - 2 cos, averaged over pairs (CLoVE Table 8): -> (...)."""
    return matched_mean(2 - 2 * similarity, match)
