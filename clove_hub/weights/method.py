"""A whole method with its weights: student, teacher and heads, of a run or as a paper's authors released it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from clove_hub.backbones import create_backbone
from clove_hub.methods import METHODS
from clove_hub.settings import build
from clove_hub.zoo.released import read_released
from clove_hub.zoo.tensors import read_tensors, require_finite

from .run import find_checkpoint, read_checkpoint
from .source import find_source
from .weights import Preprocessing

BACKBONE_ALONE = {
    "bundle": "a bundle",
    "timm": "a model of timm",
    "random": "a random backbone",
}


@dataclass(frozen=True)
class MethodState:
    """Every tensor of a method."""

    name: str
    """The method's, in the registry."""
    what: str
    """For messages: `the run runs/photos, step 150`."""
    tensors: dict[str, Tensor]
    """By the names of the method's state dict."""
    preprocessing: Preprocessing
    backbone: str | None = None
    """The architecture; None where only the tensors are known, as in a released file."""
    settings: Mapping[str, Any] | None = None
    """Of the method, as the run's recipe has them; None as above."""

    @cached_property
    def method(self) -> Any:
        """The method with these weights, in eval mode.

        Raises:
            ValueError: the settings are not known, or the tensors are not what they ask for.
        """
        if self.backbone is None or self.settings is None:
            raise ValueError(
                f"{self.what} does not say with which settings it was trained: give a run, or "
                f"`clove-hub pretrain RECIPE run.init_from=FILE` one step on from it"
            )
        if self.name not in METHODS:
            raise ValueError(f"{self.what} is of {self.name!r}; the methods are {', '.join(METHODS)}")
        kind = METHODS[self.name]
        method = kind.build(create_backbone(self.backbone), build(kind.settings, self.settings, "method"))
        try:
            method.load_state_dict(self.tensors)
        except RuntimeError as error:
            raise ValueError(f"{self.what} does not hold what its recipe asks for: {error}") from error
        return method.eval().requires_grad_(False)


def load_method(source: str | Path) -> MethodState:
    """Reads the whole state of a method.

    Args:
        source: a run's folder, one of its checkpoints, `hf-hub:organization/name[@revision]` of a published state, or a
            checkpoint that a paper's authors released whole.

    Raises:
        ValueError: it is none of these, or it holds a backbone alone; it is damaged, or has values that are not finite.
    """
    kind, at, name = place = find_source(source)
    if kind in BACKBONE_ALONE:
        raise ValueError(
            f"{name} is {BACKBONE_ALONE[kind]}: it holds a backbone alone, not the teacher and the heads. Give a run's "
            "folder, hf-hub:organization/name of a published state, or a checkpoint that a paper's authors released whole"
        )
    if kind == "file":
        released = read_released(at)
        found = MethodState(
            released.format, f"{at}, a released {released.title} checkpoint", released.tensors, Preprocessing()
        )
    else:
        checkpoint = find_checkpoint(place.path) if kind == "run" else read_checkpoint(place.path)
        state = checkpoint.state
        tensors, _ = read_tensors(checkpoint.folder / "model.safetensors")
        settings = {key: value for key, value in state.recipe["method"].items() if key != "name"}
        what = f"{checkpoint.folder if kind == 'run' else name}, step {state.step}"
        found = MethodState(state.method, what, tensors, state.preprocessing, state.backbone, settings)
    require_finite(found.tensors, found.what)
    return found
