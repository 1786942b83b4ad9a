"""The method of a run, as its newest checkpoint left it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

from clove_hub.backbones import create_backbone
from clove_hub.methods import METHODS
from clove_hub.runs import newest_checkpoint
from clove_hub.settings import build
from clove_hub.weights.backbone import Preprocessing


class Learned(NamedTuple):
    name: str
    """Of the method."""
    method: Any
    """With its weights, in eval mode."""
    preprocessing: Preprocessing


def load_method(run: Path) -> Learned:
    """
    Raises:
        ValueError: there is no whole checkpoint in the folder, or it does not hold what its recipe asks for.
    """
    newest = newest_checkpoint(run)
    if newest is None:
        raise ValueError(f"{run} has no complete checkpoint (checkpoints/step_*): give the folder of a run")
    folder, state = newest
    if state["method"] not in METHODS:
        raise ValueError(f"{run} is a run of {state['method']!r}; the methods are {', '.join(METHODS)}")
    kind = METHODS[state["method"]]
    settings = {key: value for key, value in state["recipe"]["method"].items() if key != "name"}
    method = kind.build(create_backbone(state["backbone"]), build(kind.settings, settings, "method"))
    try:
        method.load_state_dict(load_file(folder / "model.safetensors"))
    except RuntimeError as error:
        raise ValueError(f"{folder} does not hold what its recipe asks for: {error}") from error
    seen = state["preprocessing"]
    return Learned(
        state["method"],
        method.eval().requires_grad_(False),
        Preprocessing(seen["size"], tuple(seen["mean"]), tuple(seen["std"])),
    )
