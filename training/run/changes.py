"""The settings that may change when a run resumes, and the record of changes."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def changes_of(
    run: Path,
    state: Mapping[str, Any],
    changed: Sequence[str],
    foreign: Sequence[str],
    *,
    amend: bool,
    steps: int,
    option: str,
    way_out: str = "",
) -> list[dict[str, Any]]:
    """The changes of a run after its first step, including those of this start.

    Args:
        run: its folder.
        state: of the checkpoint to resume from.
        changed: the differences from its settings, `section.key: old -> new`.
        foreign: those of them that would make it another run.
        amend: whether the run may be changed.
        steps: the total of the settings.
        option: the option that names the folder in a command.
        way_out: one more sentence in the error for a run that may not be changed.

    Raises:
        ValueError: the settings are another run's, or change the run without `amend`.
    """
    earlier = list(state.get("changes", []))
    if not changed:
        return earlier
    other = (
        f"{run} holds a run with other settings ({'; '.join(changed)}): start with the old ones to resume, or choose"
    )
    if foreign:
        raise ValueError(f"{other} another {option}")
    if not amend:
        raise ValueError(
            f"{other} another {option}. To resume from step {state['step']} with the new ones, which the run then records, "
            f"add run.amend=true.{way_out}"
        )
    if steps < state["step"]:
        raise ValueError(
            f"{shlex.quote(str(run))} is at step {state['step']}, but would end at step {steps} with the changed settings: set "
            f"schedule.steps to {state['step']} or more"
        )
    log.warning("from step %d on, this run has other settings: %s", state["step"], "; ".join(changed))
    return [*earlier, {"step": state["step"], "changed": list(changed)}]
