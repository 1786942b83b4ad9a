"""Continued pre-training: a method that begins as another run left it, or as a paper's authors did.

Weights and buffers of student, teacher and heads are taken over; optimizer, schedule and step are those of a new run.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from clove_hub.runs import newest_checkpoint, read_state
from clove_hub.zoo.released import read_released
from clove_hub.zoo.tensors import require_names_and_shapes

log = logging.getLogger(__name__)

HUB = "hf-hub:"
FILES = ("state.json", "model.safetensors")
"""What a repository with a pre-training state holds at its top level, beside the optimizer's tensors."""


def begin_from(source: str, method: nn.Module, name: str) -> None:
    """Loads the whole state of a method, every tensor in its place.

    Args:
        source: a run's folder, `hf-hub:organization/name[@revision]` of a published pre-training state, or a checkpoint
            that the paper's authors released.
        method: the one to begin; left as it is if anything is wrong.
        name: its name in the registry.

    Raises:
        ValueError: there is no such state, it cannot be fetched or is damaged, it is another method's, or a tensor is
            missing, unexpected or mis-shaped.
    """
    found, tensors, where = _read(source)
    if found != name:
        raise ValueError(
            f"run.init_from={source} is the state of {found!r}, and this recipe trains {name!r}: "
            "take a state of the same method"
        )
    expected = {key: tensor.shape for key, tensor in method.state_dict().items()}
    require_names_and_shapes(tensors, expected, f"run.init_from={source} for this recipe's method and backbone")
    method.load_state_dict(tensors)
    log.info("starting with the weights of %s", where)


def _read(source: str) -> tuple[str, dict[str, Tensor], str]:
    """The method's name, its tensors, and what they are in words."""
    if source.startswith(HUB):
        folder = _fetch(source)
        state = _named(source, read_state, folder)
        return state["method"], load_file(folder / "model.safetensors"), f"{source}, step {state['step']}"
    path = Path(source)
    if path.is_dir():
        newest = _named(source, newest_checkpoint, path)
        if newest is None:
            raise ValueError(
                f"run.init_from={source} has no complete checkpoint (checkpoints/step_*): give the folder of a run, "
                f"{HUB}organization/name of a published state, or a released checkpoint. A bundle holds a backbone "
                "alone, not the heads and the teacher that training goes on with"
            )
        folder, state = newest
        return state["method"], load_file(folder / "model.safetensors"), f"{folder}"
    released = _named(source, read_released, path)
    return released.format, released.tensors, f"{path}, a released {released.format} checkpoint"


def _named(source: str, read: Any, path: Path) -> Any:
    try:
        return read(path)
    except ValueError as error:
        raise ValueError(f"run.init_from={source}: {error}") from error


def _fetch(source: str) -> Path:
    """The folder of the state's files in the local cache of the Hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, _, revision = source.removeprefix(HUB).partition("@")
    try:
        folder = Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=["state.json", "*.safetensors"])
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"run.init_from={source}: cannot fetch it ({type(error).__name__}: {reason}). Check the name, the network, "
            "and for a private repository `hf auth login`"
        ) from error
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"run.init_from={source} has no {missing[0]}: it is no published pre-training state. A bundle holds a "
            "backbone alone, not the heads and the teacher that training goes on with"
        )
    return folder
