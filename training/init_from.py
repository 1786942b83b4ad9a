"""Continued pre-training: a method that begins as another run left it, or as a paper's authors did.

Weights and buffers of student, teacher and heads are taken over; optimizer, schedule and step are those of a new run.
"""

from __future__ import annotations

import logging

from torch import nn

from clove_hub.weights import load_method
from clove_hub.zoo.tensors import require_names_and_shapes

log = logging.getLogger(__name__)


def begin_from(source: str, method: nn.Module, name: str) -> None:
    """Loads the whole state of a method, every tensor in its place.

    Args:
        source: as in `load_method`.
        method: the one to begin; left as it is if anything is wrong.
        name: its name in the registry.

    Raises:
        ValueError: there is no such state, it cannot be fetched or is damaged, it is another method's, or a tensor is
            missing, unexpected or mis-shaped.
    """
    try:
        found = load_method(source)
    except ValueError as error:
        raise ValueError(f"run.init_from={source}: {error}") from error
    if found.name != name:
        raise ValueError(
            f"run.init_from={source} is the state of {found.name!r}, and this recipe trains {name!r}: "
            "take a state of the same method"
        )
    expected = {key: tensor.shape for key, tensor in method.state_dict().items()}
    require_names_and_shapes(found.tensors, expected, f"run.init_from={source} for this recipe's method and backbone")
    method.load_state_dict(found.tensors)
    log.info("starting with the weights of %s", found.what)
