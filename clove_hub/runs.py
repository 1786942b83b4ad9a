"""A run's folder, as training and fine-tuning leave it and as export finds it.

    RUN/recipe.yaml                                         the resolved recipe
    RUN/metrics.jsonl                                       a row for every few steps
    RUN/checkpoints/step_00001234/model.safetensors         the whole method: student, teacher, heads
    RUN/checkpoints/step_00001234/optimizer.safetensors
    RUN/checkpoints/step_00001234/state.json                everything else, and the sums of the other files

Only a folder named `step_*` is complete; one whose sums do not hold is damaged.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FORMAT = 1
STATE_FILE = "state.json"
STATE = (
    *("step", "steps_total", "epoch", "finished", "images_seen", "method", "exported", "backbone", "preprocessing"),
    *("data", "hardware", "versions", "recipe", "grad_scaler", "files"),
)
"""The keys of a pre-training's state.json beside `format`."""
log = logging.getLogger(__name__)


def checkpoint_folders(run: Path) -> list[Path]:
    """The complete checkpoints of a run, the newest first."""
    return sorted((run / "checkpoints").glob("step_*"), reverse=True)


def newest_checkpoint(run: Path, keys: Sequence[str] = STATE) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its state; damaged ones are passed over with a warning.

    Args:
        keys: those that the state must have.

    Raises:
        ValueError: there are checkpoints, but none of them is whole.
    """
    folders = checkpoint_folders(run)
    for folder in folders:
        try:
            return folder, read_state(folder, keys)
        except ValueError as error:
            log.warning("passing over the damaged checkpoint %s: %s", folder, error)
    if folders:
        raise ValueError(
            f"{run} has {len(folders)} checkpoints and none is whole (see the warnings): take them from a backup, or "
            f"remove {run / 'checkpoints'} and train again"
        )
    return None


def read_state(folder: Path, keys: Sequence[str] = STATE) -> dict[str, Any]:
    """What state.json says, once every file of the checkpoint has been found to be what was written.

    Raises:
        ValueError: it cannot be read, is of another format, or a file is missing or changed.
    """
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path} has format {found!r}, expected {FORMAT}: use the version of clove-hub that wrote it")
    lacking = [key for key in keys if key not in state]
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(map(repr, lacking))}: use the version of clove-hub that wrote it")
    for name, expected in state["files"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing")
        if (found := sha256(folder / name)) != expected:
            raise ValueError(f"{folder / name} has sha256 {found[:12]}..., state.json says {expected[:12]}...")
    return state


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if there is no such file."""
    return [json.loads(line) for line in complete_lines(path)]


def complete_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")]


def another_run(run: Path, changed: Sequence[str], option: str) -> str:
    """Why a folder's run is not gone on with; `option` is what names the folder."""
    return (
        f"{run} holds a run with other settings ({'; '.join(changed)}): "
        f"start with the old ones to go on, or choose another {option}"
    )


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
