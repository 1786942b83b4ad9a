"""A run's folder, as training and fine-tuning write it and export reads it.

    RUN/recipe.yaml                                         the resolved recipe
    RUN/metrics.jsonl                                       a row for every few steps
    RUN/checkpoints/step_00001234/model.safetensors         the whole method: student, teacher, heads
    RUN/checkpoints/step_00001234/optimizer.safetensors
    RUN/checkpoints/step_00001234/state.json                everything else, and the sums of the other files

Only a folder named `step_` and a number is complete; one whose checksums do not match, or whose weights are not finite,
is damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clove_hub.documents import reason

FORMAT = 1
METRICS = "metrics.jsonl"
STATE_FILE = "state.json"
CONTENT = ("model", "optimizer")
"""The files of tensors in a checkpoint, without their ending."""
STATE = (
    *("step", "steps_total", "epoch", "finished", "images_seen", "method", "exported", "backbone", "preprocessing"),
    *("data", "hardware", "versions", "recipe", "grad_scaler", "files"),
)
"""The keys of a pre-training's state.json beside `format`."""
log = logging.getLogger(__name__)


def checkpoint_folders(run: Path) -> list[Path]:
    """The complete checkpoints of a run, the newest first."""
    found = {path: re.fullmatch(r"step_(\d+)", path.name) for path in (run / "checkpoints").glob("step_*")}
    steps = {path: int(match[1]) for path, match in found.items() if match and path.is_dir()}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def newest_checkpoint(run: Path, keys: Sequence[str] = STATE) -> tuple[Path, dict[str, Any]] | None:
    """The newest valid checkpoint, and its state; invalid ones are skipped with a warning.

    Args:
        keys: those that the state must have.

    Raises:
        ValueError: there are checkpoints, but none is valid.
    """
    folders, reasons = checkpoint_folders(run), []
    for folder in folders:
        try:
            return folder, read_state(folder, keys)
        except ValueError as error:
            reasons.append(str(error))
            log.warning("skipping the damaged checkpoint %s: %s", folder, error)
    if folders:
        raise ValueError(
            f"{run} has {len(folders)} checkpoint{'s' if len(folders) > 1 else ''} and none is intact ({reasons[0]}): "
            f"restore them from a backup, or remove {run / 'checkpoints'} and train again"
        )
    return None


def read_state(folder: Path, keys: Sequence[str] = STATE) -> dict[str, Any]:
    """Read state.json after verifying that every file is unchanged and every weight finite.

    Raises:
        ValueError: it cannot be read, is of another format, a file is missing or changed, or a number is not finite.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({reason(error)})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path} has format {found!r}, expected {FORMAT}: use the version of clove-hub that wrote it")
    lacking = [key for key in keys if key not in state]
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(map(repr, lacking))}: use the version of clove-hub that wrote it")
    if not isinstance(state["files"], dict) or not {f"{name}.safetensors" for name in CONTENT} <= state["files"].keys():
        raise ValueError(f"{path} has no checksums of the checkpoint's files: it was changed after it was written")
    named = re.fullmatch(r"step_(\d+)", folder.name)  # on the Hub the folder has another name
    if type(state["step"]) is not int or (named and int(named[1]) != state["step"]):
        raise ValueError(f"{path} has step {state['step']!r}, which is not that of the folder {folder.name}")
    for name, expected in state["files"].items():
        try:
            found = sha256(folder / name)
        except FileNotFoundError:
            raise ValueError(f"{folder / name} is missing") from None
        except OSError as error:
            raise ValueError(f"{folder / name} cannot be read ({error.strerror})") from error
        if found != expected:
            raise ValueError(f"{folder / name} has sha256 {found[:12]}..., but state.json has {expected!s:.12}...")
    for path in (folder / f"{name}.safetensors" for name in CONTENT):
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118  # it is no mapping
                    tensor = file.get_tensor(key)
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        raise ValueError(f"{path}: {key} holds non-finite values")
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error})") from error
    return state


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if there is no such file."""
    return [json.loads(line) for line in complete_lines(path)]


def complete_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")]


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically, even if the machine fails."""
    target = path.resolve()
    draft = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
