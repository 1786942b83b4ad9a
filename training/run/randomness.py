"""The seeds of what is random in a run. Those of an image are `clove_hub.views.stream`'s."""

from __future__ import annotations

import numpy as np


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of everything random in a step that is not about an image, such as stochastic depth or proposals.

    Args:
        seed: the run's.
        step: counted from 0.
        rank: of the process, which draws numbers of its own.
    """
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
