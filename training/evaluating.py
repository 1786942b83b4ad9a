"""Evaluation during a run: the protocols that the recipe asks for, on the backbone that export writes.

    RUN/evaluations.jsonl      one row for each evaluation: its step, what was asked for, and the whole record

The first evaluation is before the first step: it measures the starting weights, and finds faults in its data before
training. Evaluation does not change the run.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from clove_hub.evaluation.adaptation import adaptations
from clove_hub.evaluation.result import Record, plain
from clove_hub.evaluation.run import make_settings, run_protocol
from clove_hub.runs import read_rows
from clove_hub.weights import Preprocessing
from clove_hub.weights.architectures import checked_model_args
from clove_hub.weights.weights import architecture_of

from .recipe import Recipe
from .run.folder import RunFolder
from .settings import Evaluation

log = logging.getLogger(__name__)

ROWS = "evaluations.jsonl"
GUARD_IMAGES = 200
"""Photos for the evaluation of a run without evaluations of its own."""


def check(evaluations: Sequence[Evaluation]) -> None:
    """Raise ValueError if one of them cannot be carried out, as far as that can be checked beforehand."""
    for number, one in enumerate(evaluations):
        try:
            make_settings(one.protocol, one.settings)
        except ValueError as error:
            raise ValueError(f"evaluate[{number}]: {error}") from error
        if not Path(one.data).expanduser().is_dir():
            raise ValueError(f"evaluate[{number}].data={one.data!r} is not a folder")
    labels = [label(one) for one in evaluations]
    if twice := {name for name in labels if labels.count(name) > 1}:
        raise ValueError(
            f"evaluate has {', '.join(sorted(twice))} twice: give a protocol once for folders of the same name"
        )


def guarding(recipe: Recipe, steps: int) -> tuple[Evaluation, ...]:
    """The recipe's evaluations.

    A run from trained weights without evaluations of its own is evaluated by `correspond` on its images: before the
    first step, ten times during training, and at the end.
    """
    if recipe.evaluate or not recipe.backbone.pretrained:
        return recipe.evaluate
    path = recipe.data.path
    if recipe.data.source != "folder" or not isinstance(path, str):
        log.warning(
            "nothing measures whether continued training helps: give a folder of photos, as in "
            '"evaluate=[{protocol: correspond, data: DIR, every: %d}]"',
            max(steps // 10, 1),
        )
        return ()
    return (Evaluation("correspond", path, max(steps // 10, 1), {"images": GUARD_IMAGES}),)


def warn_where_it_hurts(run: Path) -> None:
    """Warn about each figure that fell below that of the starting weights, with advice."""
    for one in adaptations(read_rows(run / ROWS)):
        if one.hurt:
            log.warning(
                "continued training has hurt so far (%s): set backbone.freeze_norm=true where there is batch norm, lower "
                "optimizer.learning_rate or optimizer.backbone_rate, set optimizer.layer_decay or backbone.freeze, or train for fewer steps",
                one,
            )


def due(evaluations: Sequence[Evaluation], step: int, steps: int) -> list[Evaluation]:
    """Those to carry out after `step` of `steps` steps: every so many, before the first, and after the last."""
    return [one for one in evaluations if step % one.every == 0 or step == steps]


def missing(evaluations: Sequence[Evaluation], run: Path, step: int, steps: int) -> list[Evaluation]:
    """Those that are due after `step`, but of which the run has no row."""
    there = [row["asked"] for row in read_rows(run / ROWS) if row["step"] == step]
    return [one for one in due(evaluations, step, steps) if asked(one) not in there]


def results(
    evaluations: Sequence[Evaluation],
    method: Any,
    preprocessing: Preprocessing,
    model_args: Mapping[str, Any],
    folder: RunFolder,
    step: int,
) -> Iterator[tuple[str, Record]]:
    """Carries them out, one after the other, and writes each one's row; all processes take part and get all records.

    Yields:
        The label and the record.

    Raises:
        ValueError: something is wrong with an evaluation's data.
    """
    if not evaluations:
        return
    backbone: nn.Module = copy.deepcopy(getattr(method, method.exported)["backbone"])
    args = checked_model_args(model_args, architecture_of(backbone), "backbone.args")
    for one in evaluations:
        what = f"{folder.path} (step {step})"
        record = run_protocol(one.protocol, backbone, preprocessing, one.data, one.settings, one.seed, what, args)
        folder.append(ROWS, {"step": step, "asked": asked(one), "record": plain(record)})
        yield label(one), record


def asked(evaluation: Evaluation) -> dict[str, Any]:
    """What makes it this evaluation and no other."""
    return {key: value for key, value in dataclasses.asdict(evaluation).items() if key != "every"}


def label(evaluation: Evaluation) -> str:
    return f"{evaluation.protocol}/{Path(evaluation.data).name}"
