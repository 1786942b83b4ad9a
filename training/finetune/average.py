"""The moving average of a network's weights (Polyak and Juditsky 1992), which often scores better than the last ones."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Averaged(nn.Module):
    """A network in training, and the average of its weights and statistics; a checkpoint holds both.

    Args:
        decay: the fraction of the average that is kept in a step.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.network = network
        self.average = copy.deepcopy(network).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights after a step, counted from 0.

        At first it moves by more, as it starts from untrained heads.
        """
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        pairs = list(zip(self.average.state_dict().values(), self.network.state_dict().values(), strict=True))
        smooth = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([mean for mean, _ in smooth], [own for _, own in smooth], share)
        for count, own in (pair for pair in pairs if not pair[0].is_floating_point()):
            count.copy_(own)
