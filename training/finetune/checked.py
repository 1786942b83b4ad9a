"""Before the first step: every image can be read and fits its annotations. Done once for the data of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from clove_hub.check import Images, check
from clove_hub.evaluation.processes import gather, share

from .loop import bar

log = logging.getLogger(__name__)

DONE = "checked.json"


def require_sound(
    out: Path, fingerprint: str, parts: Sequence[Images], accelerator: Accelerator, workers: int, command: str
) -> None:
    """Checks all images, shared among the processes, unless the run's folder says that this was done.

    Args:
        fingerprint: of the data.
        command: that lists all that is bad, for the message.

    Raises:
        ValueError: some are bad; all processes raise it.
    """
    done = out / DONE
    try:
        if json.loads(done.read_text(encoding="utf-8")) == {"data": fingerprint}:
            return
    except (OSError, ValueError):
        pass
    bad: list[str] = []
    count = 0
    for images in parts:
        own = share(range(len(images.paths)))
        found = gather(bar(check(images, own, workers), "checking the images", accelerator, len(own)))
        bad += [f"{one.name}: {one.problem}" for one in found if one.problem]
        count += len(found)
    if bad:
        raise ValueError(
            f"{len(bad)} of {count} images cannot be used: {'; '.join(bad[:3])}{'; ...' if len(bad) > 3 else ''}. "
            f"`{command}` lists all; mend them, or take them out of the data set"
        )
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        done.write_text(json.dumps({"data": fingerprint}) + "\n", encoding="utf-8")
        log.info("all %d images can be read and fit their annotations", count)
    accelerator.wait_for_everyone()
